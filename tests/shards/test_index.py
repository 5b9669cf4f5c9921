"""The index: built from sidecars or by a scan, and refused when it is not what it should be."""

from __future__ import annotations

import copy
import io
import logging
import sys
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds

import shards
from infra.errors import RunError, UserError
from infra.storage import Folder
from shards import entries, index
from shards.layout import INDEX, STATS_SUFFIX
from shards.scan import file_digest, scan_ends
from shards.stream import ShardStream
from shards.verify import verify

Corpus = Callable[..., Folder]


def same(left: index.Index, right: index.Index) -> bool:
    return left.shards == right.shards and all(
        np.array_equal(left.ends(number), right.ends(number)) for number in range(len(left.shards))
    )


def test_saved_and_loaded(own_shards: Folder) -> None:
    built = index.build(own_shards)
    loaded = index.load(own_shards)
    assert same(built, loaded)
    assert [shard.samples for shard in loaded.shards] == [17, 25, 12]
    assert [shard.first_sample for shard in loaded.shards] == [0, 17, 42]
    before = own_shards.read(INDEX)
    index.save(own_shards, loaded)
    assert own_shards.read(INDEX) == before
    for number, shard in enumerate(loaded.shards):
        ends = loaded.ends(number)
        assert (np.diff(ends) > 0).all()
        assert (scan_ends(own_shards, shard.name) == ends).all()
        assert file_digest(own_shards, shard.tar) == shard.tar_sha256


def many(folder: Folder) -> Folder:
    """An index of 200 shards with 0 to 4 samples each."""
    entries, ends, first = [], [], 0
    for number in range(200):
        count = number % 5
        entries.append(index.Shard(f"{number:05d}", count, first, 512 * count + 1024))
        ends.append(np.arange(1, count + 1, dtype=np.int64) * 512)
        first += count
    index.save(folder, index.Index(entries, ends))
    return folder


def test_row_groups_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "ENDS_HELD", 100)
    many(Folder(tmp_path))
    assert pq.ParquetFile(tmp_path / INDEX).num_row_groups == 4
    loaded = index.load(Folder(tmp_path))
    for number in np.random.default_rng(0).permutation(200).tolist():
        assert loaded.ends(number).tolist() == [512 * (row + 1) for row in range(number % 5)]
        assert loaded._held() <= 2 * 128
    assert [next(loaded.pieces(0, 4))[0], loaded.shard_of(loaded.samples - 1)] == [1, 199]
    assert sum(stop - start for _, start, stop in loaded.pieces(3, 333)) == 330


def test_any_webdataset_folder_is_read(tmp_path: Path) -> None:
    for shard in range(2):
        with wds.TarWriter(str(tmp_path / f"shard-{shard}.tar")) as out:
            for row in range(9):
                out.write({"__key__": f"s{shard}/{row:03d}", "png": b"image", "txt": f"{row}", "cls": b"7"})
    stream = ShardStream(str(tmp_path), global_batch_size=6)
    assert sorted(sample["__key__"] for sample in stream.samples()) == [
        f"s{shard}/{row:03d}" for shard in range(2) for row in range(9)
    ]
    index.save(Folder(tmp_path), index.build(Folder(tmp_path), digests=True))
    again = [sample["txt"] for sample in ShardStream(str(tmp_path), global_batch_size=6).samples()]
    assert len(again) == 18
    assert shards.open(tmp_path)["s1/004"]["cls"] == b"7"


def test_a_tar_that_changed_after_indexing_is_named(tmp_path: Path) -> None:
    def write(rows: int) -> None:
        with wds.TarWriter(str(tmp_path / "a.tar")) as out:
            for row in range(rows):
                out.write({"__key__": f"{row:05d}", "jpg": b"i", "txt": "t"})

    write(40)
    folder = Folder(tmp_path)
    index.save(folder, index.build(folder))
    write(60)
    words = rf"a\.tar: this shard has \d+ bytes where the index says \d+; restore it, .*`pairmill index {tmp_path}`"
    with pytest.raises(RunError, match=words):
        next(iter(ShardStream(folder, global_batch_size=4)))
    with pytest.raises(RunError, match=words):
        shards.open(folder.url)[3]


def test_a_shard_of_another_size_than_committed_is_not_indexed(own_shards: Folder) -> None:
    path = Path(own_shards.path("00001.tar"))
    path.write_bytes(path.read_bytes()[:-1024])
    with pytest.raises(UserError, match=r"00001\.tar: this shard has \d+ bytes where its commit says \d+; make or"):
        index.build(own_shards)


def test_without_an_index_the_log_names_the_command(own_shards: Folder, caplog: pytest.LogCaptureFixture) -> None:
    own_shards.delete(INDEX)
    with caplog.at_level(logging.WARNING, logger="pairmill"):
        ShardStream(own_shards, global_batch_size=4)
    assert f"until `pairmill index {own_shards.url}` has written one" in caplog.text


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"first_sample": 16}, "shard 00001 begins at sample 16, it should at 17"),
        ({"samples": 24}, "shard 00002 begins at sample 42, it should at 41"),
        ({"ends": [512 * row for row in range(1, 25)]}, "the addresses of shard 00001 cannot be right"),
        ({"ends": [512 * row for row in range(25, 0, -1)]}, "the addresses of shard 00001 cannot be right"),
        ({"ends": [100 * row for row in range(1, 26)]}, "the addresses of shard 00001 cannot be right"),
        ({"ends": [1 << 20 << row for row in range(25)]}, "the addresses of shard 00001 cannot be right"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(own_shards: Folder, columns: dict[str, Any], words: str) -> None:
    table = index.load(own_shards).table(0, 64)
    rows = table.to_pylist()
    rows[1] |= columns
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), out)
    own_shards.write(INDEX, out.getvalue())
    with pytest.raises(UserError, match=words):
        list(ShardStream(own_shards, global_batch_size=4))


def test_uncommitted_shards_are_not_there(own_shards: Folder) -> None:
    own_shards.delete("00001" + STATS_SUFFIX)
    assert [shard.name for shard in index.build(own_shards).shards] == ["00000", "00002"]
    own_shards.delete("00002.tar")
    own_shards.delete("00002.parquet")
    with pytest.raises(UserError, match=r"00002\.tar: this shard is missing"):
        index.build(own_shards)


def test_an_index_of_another_version_or_kind_is_refused(own_shards: Folder) -> None:
    table = pq.read_table(io.BytesIO(own_shards.read(INDEX)))
    out = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({entries.VERSION_KEY: b"2"}), out)
    own_shards.write(INDEX, out.getvalue())
    with pytest.raises(UserError, match=r"index\.parquet: index of format version 2, this version reads 1"):
        ShardStream(own_shards, global_batch_size=4)
    own_shards.write(INDEX, b"PAR1 or not")
    with pytest.raises(UserError, match=r"index\.parquet: not an index"):
        ShardStream(own_shards, global_batch_size=4)


def test_an_index_whose_name_climbs_out_is_refused(own_shards: Folder) -> None:
    built = index.build(own_shards)
    evil = index.Shard("../../etc/passwd", 17, 0, built.shards[0].tar_bytes)
    index.save(own_shards, index.Index([evil, *built.shards[1:]], [built.ends(n) for n in range(3)]))
    with pytest.raises(UserError, match="may not leave its folder"):
        ShardStream(own_shards, global_batch_size=4)


def test_a_damaged_tar_without_index_is_the_users_to_mend(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("0.jpg")
        info.size = 4000
        tar.addfile(info, io.BytesIO(bytes(4000)))
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:3000])
    with pytest.raises(UserError, match=r"a\.tar: damaged tar \(byte"):
        ShardStream(str(tmp_path), global_batch_size=1)


def test_random_access(shards_of: Corpus) -> None:
    folder = shards_of(40, 25)
    samples = shards.open(folder.url, decode=True)
    assert len(samples) == 65
    assert samples[0]["__key__"] == "000000000"
    assert samples[-1]["__key__"] == samples["000010024"]["__key__"] == "000010024"
    assert samples["000010003"]["txt"] == "picture 3 of shard 1, señor"
    assert samples[43]["jpg"].shape == (8, 8, 3)
    assert [sample["__index__"] for sample in samples][:3] == [0, 1, 2]
    with pytest.raises(IndexError):
        samples[65]
    with pytest.raises(KeyError, match="000019999"):
        samples["000019999"]


def test_threads_share_row_groups_that_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "ENDS_HELD", 1)
    loaded = index.load(many(Folder(tmp_path)))
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda number: len(loaded.ends(number)), [*range(0, 200, 7)] * 50))
    finally:
        sys.setswitchinterval(before)
    assert found == [number % 5 for number in range(0, 200, 7)] * 50
    assert same(copy.deepcopy(loaded), loaded)


@pytest.mark.parametrize("group", [1, 7, 100, 1000])
def test_any_row_groups_are_read(tmp_path: Path, group: int) -> None:
    folder = many(Folder(tmp_path))
    before = index.load(folder)
    pq.write_table(pq.read_table(tmp_path / INDEX), tmp_path / INDEX, row_group_size=group)
    assert same(index.load(folder), before)


def test_a_plainly_rewritten_index_is_verified_and_one_without_addresses_refused(own_shards: Folder) -> None:
    path = Path(own_shards.path(INDEX))
    table = pq.read_table(path)
    pq.write_table(table, path, row_group_size=1)
    assert verify(own_shards).ok
    pq.write_table(table.drop_columns(["ends"]), path)
    with pytest.raises(UserError, match=r"not an index .*no column ends"):
        index.load(own_shards)
