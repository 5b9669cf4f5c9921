"""A tar that is cut or has a flipped byte: what stream, verify, repair and a scan each say of it."""

from __future__ import annotations

import io
import logging
import tarfile
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
from shards import index
from shards.layout import INDEX, STATS_SUFFIX
from shards.repair import repair
from shards.sample import BadSampleError
from shards.scan import file_digest
from shards.stream import ShardStream
from shards.tar import END, padded
from shards.verify import verify

pytestmark = pytest.mark.usefixtures("either_read")
NAME, ROW = "00001", 3
"""The shard that is damaged, and which of its samples."""
MEMBERS = ("image", "txt", "json")


def members_of(folder: Folder) -> dict[str, tarfile.TarInfo]:
    """The three members of the damaged sample."""
    with tarfile.open(folder.path(f"{NAME}.tar")) as tar:
        return dict(zip(MEMBERS, tar.getmembers()[3 * ROW : 3 * ROW + 3], strict=True))


def places(folder: Folder) -> dict[str, int]:
    """Offsets of every kind of place in the tar."""
    image, text, facts = (members_of(folder)[name] for name in MEMBERS)
    size = folder.size(f"{NAME}.tar")
    return {
        "inside a header": image.offset + 100,
        "inside a picture": image.offset_data + 50,
        "between members": text.offset,
        "inside a text": text.offset_data + 5,
        "inside a json": facts.offset_data + 5,
        "inside a padding": text.offset_data + text.size + 9,
        "between samples": image.offset,
        "before the closing blocks": size - len(END),
        "inside the closing blocks": size - len(END) + 100,
        "between the closing blocks": size - len(END) + 512,
    }


PLACES = [
    "inside a header", "inside a picture", "between members", "inside a text", "inside a json", "inside a padding",
    "between samples", "before the closing blocks", "inside the closing blocks", "between the closing blocks",
]  # fmt: skip


def damage(folder: Folder, place: str, how: str) -> None:
    path, at = Path(folder.path(f"{NAME}.tar")), places(folder)[place]
    data = path.read_bytes()
    path.write_bytes(data[:at] if how == "cut" else data[:at] + bytes([data[at] ^ 0x80]) + data[at + 1 :])


def make_foreign(folder: Folder) -> None:
    """Leave tars alone, as of a folder that another tool wrote."""
    for name in folder.names():
        if not name.endswith(".tar"):
            folder.delete(name)


def read(folder: Folder, world: int = 1, **options: Any) -> tuple[dict[tuple[int, int], dict[str, Any]], int]:
    """The samples of an epoch by (step, slot), and how many holes were counted."""
    seen, holes = {}, 0
    for rank in range(world):
        stream = ShardStream(
            folder, global_batch_size=6, rank=rank, world_size=world, remainder="keep", patience_s=0.2, **options
        )
        seen |= {(one["__step__"], one["__slot__"]): one for one in stream.samples()}
        holes += stream.holes
    return seen, holes


def keys(seen: dict[tuple[int, int], dict[str, Any]]) -> dict[tuple[int, int], str]:
    return {place: sample["__key__"] for place, sample in seen.items()}


@pytest.mark.parametrize("place", PLACES)
def test_a_cut_tar(own_shards: Folder, place: str) -> None:
    whole = keys(read(own_shards)[0])
    damage(own_shards, place, "cut")
    with pytest.raises(RunError, match=rf"{NAME}\.tar: this shard has \d+ bytes where the index says \d+; restore it"):
        read(own_shards)
    seen, holes = read(own_shards, skip_unreadable=True)
    assert holes == 25
    lost = {key for key in whole.values() if key.startswith(NAME)}
    assert {at: key for at, key in keys(seen).items() if whole[at] not in lost} == {
        at: key for at, key in whole.items() if key not in lost
    }
    # A shard is lost as a whole, not from where each rank came upon it.
    assert keys(read(own_shards, 3, skip_unreadable=True)[0]) == keys(seen)

    report = verify(own_shards)
    assert {fault.shard for fault in report.faults} == {NAME}
    told = [fault.what for fault in report.faults if fault.kind == "torn"]
    assert any("bytes in the tar" in what for what in told)
    is_in_last_block = place == "between the closing blocks"
    assert any("damaged tar after sample" in what for what in told) != is_in_last_block

    assert f"dropped the torn shard {NAME}" in repair(report)[0]
    assert verify(own_shards).faults == []
    assert {key[:5] for key in keys(read(own_shards)[0]).values()} == {"00000", "00002"}


@pytest.mark.parametrize("place", PLACES)
def test_a_cut_tar_of_a_foreign_folder_is_named_by_the_scan(own_shards: Folder, place: str) -> None:
    make_foreign(own_shards)
    damage(own_shards, place, "cut")
    if place == "between the closing blocks":  # one says that nothing was to follow
        assert index.build(own_shards).samples == 54
        assert verify(own_shards).ok
        return
    for look in (index.build, read):
        with pytest.raises(UserError, match=rf"{NAME}\.tar: damaged tar \(byte \d+: .*make or fetch it again"):
            look(own_shards)  # type: ignore[operator]
    report = verify(own_shards)
    assert [fault.shard for fault in report.faults] == [NAME]
    assert repair(report) == []  # no commit says that it may be dropped
    assert own_shards.exists(f"{NAME}.tar")


@pytest.mark.parametrize("place", PLACES)
def test_a_flipped_byte(own_shards: Folder, place: str) -> None:
    key = members_of(own_shards)["txt"].name.removesuffix(".txt")
    number = index.load(own_shards).shards[1].first_sample + ROW
    before, _ = read(own_shards)
    damage(own_shards, place, "flip")
    report = verify(own_shards)
    assert {fault.shard for fault in report.faults} == {NAME}
    assert any("the tar's SHA-256" in fault.what for fault in report.faults)
    # A picture and what is empty have no digest of their own: there the shard is all that can be named.
    names_key = place in ("inside a header", "between members", "between samples", "inside a text", "inside a json")
    before_it = next(one["__key__"] for one in before.values() if one["__index__"] == number - 1)
    assert any(fault.key in (key, before_it) for fault in report.faults) == names_key

    seen, holes = read(own_shards)
    is_header = place in ("inside a header", "between members", "between samples")
    assert [one["__hole__"] for one in seen.values() if "__hole__" in one] == ([number] if is_header else [])
    changed = {
        "inside a picture": "jpg",
        "inside a text": "txt",
        "inside a json": "json",
    }.get(place)
    for at, sample in seen.items():
        if "__hole__" not in sample:
            differs = {name for name in ("jpg", "txt", "json") if sample[name] != before[at][name]}
            assert differs == ({changed} if changed and sample["__key__"] == key else set())
    if changed in ("txt", "json"):  # no longer UTF-8: decoding tells
        assert read(own_shards, decode=True)[1] == 1
    assert holes == is_header


def swap_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [*rows[:3], rows[4], rows[3], *rows[5:]]


def lose_row(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return rows[:-2]  # the last row is no success


def shift_a_block(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [*rows[:3], rows[3] | {"offset": rows[3]["offset"] + 512}, *rows[4:]]


def climb(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [*rows[:3], rows[3] | {"member": "../../evil.jpg"}, *rows[4:]]


@pytest.mark.parametrize(
    ("change", "words", "is_rescanned"),
    [
        (swap_rows, "the keys in different orders", True),
        (lose_row, "is in the tar and no success", True),
        (lose_row, "the commit counts 30 rows, the sidecar holds 28", True),
        (shift_a_block, "in the sidecar, ", True),
        (climb, "member: ../../evil.jpg in the sidecar", False),
    ],
)
def test_a_sidecar_that_disagrees(
    own_shards: Folder, change: Any, words: str, is_rescanned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    before = keys(read(own_shards)[0])
    table = pq.read_table(io.BytesIO(own_shards.read(f"{NAME}.parquet")))
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(change(table.to_pylist()), schema=table.schema), out)
    own_shards.write(f"{NAME}.parquet", out.getvalue())
    stats = own_shards.read_json(NAME + STATS_SUFFIX)
    stats |= {"sidecar_bytes": len(out.getvalue()), "sidecar_sha256": file_digest(own_shards, f"{NAME}.parquet")}
    own_shards.write_json(NAME + STATS_SUFFIX, stats)
    own_shards.delete(INDEX)
    assert any(words in fault.what and fault.shard == NAME for fault in verify(own_shards).faults)
    # The tar is what counts: the stream gives what it gave, with or without an index.
    with caplog.at_level(logging.WARNING, logger="pairmill"):
        assert keys(read(own_shards)[0]) == before
    assert ("00001.parquet: its addresses cannot be right" in caplog.text) == is_rescanned
    if change is swap_rows:
        with pytest.raises(BadSampleError, match="where the sidecar has '000010004' lies '000010003'"):
            shards.open(own_shards.url)["000010004"]


@pytest.mark.parametrize("dialect", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_a_member_that_is_there_twice_makes_its_sample_a_hole(tmp_path: Path, dialect: int) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=dialect) as tar:
        for name in ("a.jpg", "a.txt", "b.jpg", "b.txt", "b.txt", "c.jpg", "c.txt"):
            info = tarfile.TarInfo(name)
            info.size = 7
            tar.addfile(info, io.BytesIO(b"content"))
    folder = Folder(tmp_path)
    assert [(fault.key, fault.what) for fault in verify(folder).faults] == [("b", "b.txt is there twice")]
    stream = ShardStream(folder, global_batch_size=3)
    assert {one["__key__"] for one in stream.samples()} == {"a", "c"}
    assert stream.holes == 1
    with pytest.raises(BadSampleError, match=r"holds 'b\.txt' twice"):
        shards.open(tmp_path)["b"]


@pytest.mark.parametrize("has_index", [False, True])
def test_a_foreign_tar_with_a_name_that_climbs_out(tmp_path: Path, has_index: bool) -> None:
    files = [("a.jpg", b"i"), ("a.txt", b"t"), ("b.jpg", b"i"), ("../b.txt", b"t"), ("c.jpg", b"i"), ("c.txt", b"t")]
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    folder = Folder(tmp_path)
    assert any("the name '../b.txt' leaves its folder" in fault.what for fault in verify(folder).faults)
    if has_index:
        ends = 2 * padded(1) + 1024
        shard = index.Shard("x", 3, 0, folder.size("x.tar"))
        index.save(folder, index.Index([shard], [ends * np.arange(1, 4)]))
        stream = ShardStream(folder, global_batch_size=3)
        assert sorted(sample["__key__"] for sample in stream.samples()) in (["a", "a", "c"], ["a", "c", "c"])
        assert stream.holes == 1
    else:
        with pytest.raises(UserError, match=r"x\.tar: damaged tar \(byte 3072: the name '\.\./b\.txt' leaves"):
            ShardStream(folder, global_batch_size=1)


@pytest.mark.parametrize("stem", ["caf\xe9", "\xe9" * 120 + "/caf\xe9"], ids=["in the header", "before it"])
def test_a_foreign_name_in_latin_1_is_read_as_webdataset_does(tmp_path: Path, stem: str) -> None:
    tar_file = tmp_path / "x.tar"
    with tarfile.open(tar_file, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name in ("a.jpg", "a.txt", f"{stem}.jpg", f"{stem}.txt", "z.jpg", "z.txt"):
            info = tarfile.TarInfo(name)
            info.size = 7
            tar.addfile(info, io.BytesIO(b"content"))
    theirs = [
        one["__key__"].encode("utf-8", "surrogateescape") for one in wds.WebDataset(str(tar_file), shardshuffle=False)
    ]
    assert theirs == [b"a", stem.encode("latin-1"), b"z"]
    folder = Folder(tmp_path)
    assert verify(folder).faults == []
    for has_index in (False, True):
        if has_index:
            index.save(folder, index.build(folder))
        stream = ShardStream(folder, global_batch_size=1)
        assert {one["__key__"] for one in stream.samples()} == {"a", stem, "z"}
    (tmp_path / "keep.txt").write_text(f"{stem}\n", "utf-8")
    kept = ShardStream(folder, global_batch_size=1, keep=tmp_path / "keep.txt")
    assert [one["__index__"] for one in kept.samples()] == [1]
    assert shards.open(tmp_path)[stem]["txt"] == b"content"
