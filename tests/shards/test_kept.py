"""Keep lists: a stream of a part of a folder, with no rewrite."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import UserError
from infra.storage import Folder
from shards import index, kept
from shards.kept import KeepList
from shards.layout import STATS_SUFFIX
from shards.reads import Reader
from shards.stream import ShardStream


@given(st.integers(1, 3000), st.data())
def test_ranks_and_places_are_those_of_the_sorted_numbers(samples: int, data: st.DataObject) -> None:
    numbers = sorted(data.draw(st.sets(st.integers(0, samples - 1), min_size=1, max_size=60)))
    keep = KeepList(numbers, samples)
    assert len(keep) == len(numbers)
    assert keep.select(np.arange(len(numbers))).tolist() == numbers
    assert keep.select(np.array([[0], [len(numbers) - 1]])).tolist() == [[numbers[0]], [numbers[-1]]]
    assert [keep.place(number) for number in numbers] == list(range(len(numbers)))
    first = data.draw(st.integers(0, samples))
    stop = data.draw(st.integers(first, samples))
    assert keep.between(first, stop).tolist() == [number for number in numbers if first <= number < stop]
    assert keep.digest == KeepList(numbers[::-1], samples).digest


def seen(folder: Folder, world: int = 1, **options: Any) -> dict[tuple[int, int], str]:
    """Key by (step, slot) of an epoch."""
    found = {}
    for rank in range(world):
        stream = ShardStream(
            folder, global_batch_size=6, rank=rank, world_size=world, remainder="keep", patience_s=0.5, **options
        )
        for sample in stream.samples():
            found[sample["__step__"], sample["__slot__"]] = sample["__key__"]
    return found


@pytest.mark.parametrize("every", [2, 31])
def test_each_kept_sample_once_in_any_world(shards_of: Callable[..., Folder], every: int, tmp_path: Path) -> None:
    folder = shards_of(210, 7, 333, 1, 180)
    keys = [key for shard in index.load(folder).shards for key in kept.keys_in(folder, shard)][::every]
    (tmp_path / "keep.txt").write_text("\n".join(reversed(keys)) + "\n")
    whole = seen(folder, keep=str(tmp_path / "keep.txt"))
    assert sorted(whole.values()) == sorted(keys)
    table = pa.table({"key": keys, "score": [0.5] * len(keys)})
    pq.write_table(table, tmp_path / "keep.parquet")
    assert seen(folder, 3, keep=tmp_path / "keep.parquet", decode_threads=2) == whole


def test_a_sparse_list_does_not_read_what_lies_between(shards_of: Callable[..., Folder]) -> None:
    folder = shards_of(210, 7, 333, 1, 180)
    entries = index.load(folder)
    keep = KeepList([3, 4, 400, 401, 700], entries.samples)
    reader = Reader(folder, entries, kept=keep)
    reader._gap = 50
    pieces = reader.read(3, 701)
    assert [(piece.first, len(piece.ends)) for piece in pieces] == [(3, 2), (400, 2), (700, 1)]
    assert reader.size(3, 701) == sum(len(piece.data) for piece in pieces)


def test_a_hole_is_filled_from_what_is_kept(own_shards: Folder, tmp_path: Path) -> None:
    keys = list(seen(own_shards).values())
    keep = [key for key in keys if key[:5] != "00000" or key[-1] in "0123"]
    (tmp_path / "keep").write_text("\n".join(keep))
    good = seen(own_shards, keep=tmp_path / "keep")
    Path(own_shards.path("00001.tar")).unlink()
    found = seen(own_shards, 2, keep=tmp_path / "keep", skip_unreadable=True)
    assert found.keys() == good.keys()
    assert set(found.values()) < set(keep)
    assert all(found[place] == key for place, key in good.items() if key[:5] != "00001")


def test_any_tars_are_kept_by_their_own_keys(tmp_path: Path) -> None:
    with wds.TarWriter(str(tmp_path / "a.tar")) as out:
        for row in range(40):
            out.write({"__key__": f"x/{row:03d}", "jpg": b"i", "txt": b"t"})
    (tmp_path / "keep").write_text("x/003\nx/017\nx/022\nx/039\nx/030\nx/001\n")
    assert set(seen(Folder(tmp_path), keep=tmp_path / "keep").values()) == {
        "x/001", "x/003", "x/017", "x/022", "x/030", "x/039"
    }  # fmt: skip


def test_a_state_belongs_to_its_list(shards_of: Callable[..., Folder]) -> None:
    folder = shards_of(70, 65)
    state = ShardStream(folder, global_batch_size=4, keep=KeepList(range(0, 135, 2), 135)).state_dict()
    other = ShardStream(folder, global_batch_size=4, keep=KeepList(range(1, 135, 2), 135))
    with pytest.raises(UserError, match="68 there, 67 now"):
        other.load_state_dict(state)
    shifted = ShardStream(folder, global_batch_size=4, keep=KeepList([*range(0, 133, 2), 133], 135))
    with pytest.raises(UserError, match="another keep list"):
        shifted.load_state_dict(state)


def test_a_list_that_is_none_is_the_users_mistake(own_shards: Folder, tmp_path: Path) -> None:
    (tmp_path / "unknown").write_text("000000000\n000009999\nnothing\n1\n2\n3\n")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "folder").mkdir()
    out = io.BytesIO()
    pq.write_table(pa.table({"name": ["a"]}), out)
    (tmp_path / "other.parquet").write_bytes(out.getvalue())
    for name, words in (
        ("unknown", r"unknown: not in .*: '000009999', 'nothing', '1' and 2 more"),
        ("empty", "holds nothing"),
        ("other.parquet", "give a column 'key'"),
        ("missing", "no such keep list"),
        ("folder", "folder: a folder, no keep list"),
    ):
        with pytest.raises(UserError, match=words):
            ShardStream(own_shards, global_batch_size=2, keep=tmp_path / name)
    with pytest.raises(UserError, match="sample 9 of 9"):
        KeepList([9], 9)


def test_a_list_of_another_folder_is_the_users_mistake(shards_of: Callable[..., Folder]) -> None:
    for samples in (70, 731):
        with pytest.raises(UserError, match=f"of a folder of {samples} samples, here are 135"):
            ShardStream(shards_of(70, 65), global_batch_size=4, keep=KeepList(range(9), samples))


def test_all_that_have_a_key_are_kept_and_keys_may_hold_blanks(tmp_path: Path) -> None:
    for tar in "abc":
        with wds.TarWriter(str(tmp_path / f"{tar}.tar")) as out:
            for key in ("000000", "000001", "two words", "000003"):
                out.write({"__key__": key, "jpg": b"i", "txt": b"t"})
    (tmp_path / "keep.txt").write_bytes(b"000001\r\ntwo words\n")
    stream = ShardStream(str(tmp_path), global_batch_size=1, keep=tmp_path / "keep.txt")
    assert sorted(sample["__index__"] for sample in stream.samples()) == [1, 2, 5, 6, 9, 10]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_is_no_part_of_the_first_key(own_shards: Folder, tmp_path: Path, mark: bytes) -> None:
    (tmp_path / "keep.txt").write_bytes(mark + b"000000000\n000010002\n")
    stream = ShardStream(own_shards, global_batch_size=1, keep=tmp_path / "keep.txt")
    assert {sample["__key__"] for sample in stream.samples()} == {"000000000", "000010002"}


def test_repacked_keys_are_addresses(own_shards: Folder, tmp_path: Path) -> None:
    numbers = [0, 3, 17, 18, 53]
    entries = index.load(own_shards)
    at = [(entries.shards[entries.shard_of(number)], number) for number in numbers]
    for shard in entries.shards:
        stats = own_shards.read_json(shard.name + STATS_SUFFIX)
        own_shards.write_json(shard.name + STATS_SUFFIX, stats | {"layout": "0"})
    keys = [f"{shard.name}{number - shard.first_sample:04d}" for shard, number in at]
    (tmp_path / "keep").write_text("\n".join(reversed(keys)))
    assert kept.load(tmp_path / "keep", own_shards, entries).between(0, 54).tolist() == numbers
    (tmp_path / "keep").write_text("\n".join(["000000017", "0000000", keys[1], "000020011", "x", "000030000"]))
    with pytest.raises(UserError, match="'0000000', 'x', '000000017' and 1 more"):
        kept.load(tmp_path / "keep", own_shards, entries)


def test_what_is_not_kept_is_not_held(shards_of: Callable[..., Folder]) -> None:
    folder = shards_of(210, 7, 333, 1, 180)
    entries = index.load(folder)
    keep = KeepList(range(0, 731, 8), 731)
    pieces = Reader(folder, entries, kept=keep).read(0, 731)
    alone = {number: Reader(folder, entries).read(number, number + 1)[0].data for number in range(0, 731, 8)}
    found = {
        number: piece.sample(number)
        for piece in pieces
        for number in keep.between(piece.first, piece.first + len(piece.ends)).tolist()
    }
    assert found == alone
    assert sum(len(piece.data) for piece in pieces) == sum(map(len, alone.values()))
