"""Verify: a sound folder has no fault, and every fault is named with its shard."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds

from infra.errors import UserError
from infra.storage import TEMPORARY_PREFIX, Folder
from shards import entries, index
from shards.layout import INDEX, STATS_SUFFIX
from shards.repair import repair
from shards.scan import file_digest, scan_ends
from shards.stream import ShardStream
from shards.verify import verify

Damage = Callable[[Folder], None]


def patch(folder: Folder, name: str, change: Callable[[bytes], bytes]) -> None:
    path = Path(folder.path(name))
    path.write_bytes(change(path.read_bytes()))


def flipped(at: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def edit_sidecar(folder: Folder, column: str, row: int, value: object) -> None:
    """Change one cell of a sidecar, and its digests, so that only the disagreement with the tar is left."""
    rows = pq.read_table(io.BytesIO(folder.read("00001.parquet")))
    cells = rows.to_pylist()
    cells[row][column] = value
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(cells, schema=rows.schema), out)
    folder.write("00001.parquet", out.getvalue())
    recommit(folder)


def recommit(folder: Folder) -> None:
    stats = folder.read_json("00001" + STATS_SUFFIX)
    for kind, name in (("tar", "00001.tar"), ("sidecar", "00001.parquet")):
        stats[f"{kind}_bytes"] = folder.size(name)
        stats[f"{kind}_sha256"] = file_digest(folder, name)
    folder.write_json("00001" + STATS_SUFFIX, stats)
    folder.delete(INDEX)


def edit_commit(folder: Folder, **values: object) -> None:
    folder.write_json("00001" + STATS_SUFFIX, folder.read_json("00001" + STATS_SUFFIX) | values)


def rewrite_tar(folder: Folder, change: Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]]) -> None:
    with tarfile.open(folder.path("00001.tar")) as tar:
        files = [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    with tarfile.open(folder.path("00001.tar"), "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in change(files):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    recommit(folder)


def edit_index(folder: Folder, **columns: object) -> None:
    table = index.load(folder).table(0, 64)
    rows = table.to_pylist()
    rows[1] |= columns
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), out)
    folder.write(INDEX, out.getvalue())


def test_sound_folders_have_no_fault(own_shards: Folder, tmp_path: Path) -> None:
    for quick in (False, True):
        report = verify(own_shards.url, quick=quick)
        assert report.faults == []
        assert report.as_dict()["faults"] == []
        assert (report.shards, report.samples) == (3, 54)
        assert report.bytes == index.load(own_shards).tar_bytes
    own_shards.delete(INDEX)
    assert verify(own_shards).ok
    with wds.TarWriter(str(tmp_path / "plain.tar")) as out:
        for row in range(5):
            out.write({"__key__": f"{row:03d}", "png": b"image", "txt": "words"})
    plain = verify(str(tmp_path))
    assert (plain.shards, plain.samples, plain.faults) == (1, 5, [])


FAULTS: dict[str, tuple[Damage, str, str]] = {
    "flipped byte of an image": (
        lambda f: patch(f, "00001.tar", flipped(700)), "00001", "the tar's SHA-256"),
    "flipped byte of a header": (
        lambda f: patch(f, "00001.tar", flipped(5)), "00001", "byte 0: damaged tar header"),
    "flipped byte of the sidecar": (
        lambda f: patch(f, "00001.parquet", flipped(900)), "00001", "the sidecar's SHA-256"),
    "tar cut in a member": (
        lambda f: patch(f, "00001.tar", lambda data: data[:5000]), "00001", "damaged tar after sample"),
    "tar cut between members": (
        lambda f: patch(f, "00001.tar", lambda data: data[:-1024]), "00001", "without its closing blocks"),
    "tar that goes on": (
        lambda f: patch(f, "00001.tar", lambda data: data + b"x" * 512), "00001", "bytes after the archive"),
    "missing tar": (lambda f: f.delete("00001.tar"), "00001", "00001.tar is missing"),
    "missing sidecar": (lambda f: f.delete("00001.parquet"), "00001", "00001.parquet is missing"),
    "missing commit": (lambda f: f.delete("00001_stats.json"), "00001", "has no commit"),
    "commit that is no JSON": (lambda f: f.write("00001_stats.json", b"{"), "00001", "not valid JSON"),
    "missing shard": (
        lambda f: [f.delete(name) for name in f.names() if name.startswith("00001")],  # type: ignore[func-returns-value]
        "00001", "a missing shard"),
    "caption that disagrees": (
        lambda f: edit_sidecar(f, "caption", 3, "other words"), "00001", "its caption in the sidecar"),
    "offset that disagrees": (
        lambda f: edit_sidecar(f, "image_offset", 3, 77), "00001", "image_offset: 77 in the sidecar"),
    "success without a sample": (
        lambda f: edit_sidecar(f, "status", 1, "success"), "00001", "is a success in the sidecar and not"),
    "sample without a success": (
        lambda f: edit_sidecar(f, "status", 3, "filtered"), "00001", "no success in the sidecar"),
    "sample without text": (
        lambda f: rewrite_tar(f, lambda files: files[:1] + files[2:]), "00001", "not image, txt, json"),
    "members that are not adjacent": (
        lambda f: rewrite_tar(f, lambda files: [files[0], *files[3:], *files[1:3]]), "00001", "not adjacent"),
    "keys out of order": (
        lambda f: rewrite_tar(f, lambda files: files[3:] + files[:3]), "00001", "not in order"),
    "a name that climbs out": (
        lambda f: rewrite_tar(f, lambda files: [("../../evil.jpg", b"x"), *files]), "00001", "leaves its folder"),
    "json of another key": (
        lambda f: rewrite_tar(f, lambda files: [*files[:2], (files[2][0], b'{"key": "x"}'), *files[3:]]),
        "00001", "its json is not of this key"),
    "index with another count": (lambda f: edit_index(f, samples=24), "00001", "samples: 24 in the index"),
    "index with another start": (
        lambda f: edit_index(f, first_sample=16), "00001", "counts its first sample as 16, it is 17"),
    "index with other addresses": (
        lambda f: edit_index(f, ends=[512 * (row + 1) for row in range(25)]), "00001", "at another place"),
    "index of another version": (
        lambda f: f.write(INDEX, other_version(f)), "", "index of format version 9"),
    "temporary file": (
        lambda f: Path(f.path(TEMPORARY_PREFIX + "00009.tar-ab")).write_bytes(b""),  # type: ignore[func-returns-value]
        "", "left by an interrupted writer"),
    "statuses that disagree": (
        lambda f: edit_commit(f, by_status={"success": 24, "filtered": 6}), "00001",
        "by status: {'success': 24, 'filtered': 6} in the commit, {'success': 25, 'filtered': 5} in the sidecar"),
    "stranger": (lambda f: f.write("notes.txt", b""), "notes.txt", "belongs to no shard"),
}  # fmt: skip


def other_version(folder: Folder) -> bytes:
    out = io.BytesIO()
    table = index.load(folder).table(0, 64)
    pq.write_table(table.replace_schema_metadata({entries.VERSION_KEY: b"9"}), out)
    return out.getvalue()


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_named_with_its_shard(own_shards: Folder, name: str) -> None:
    damage, shard, words = FAULTS[name]
    damage(own_shards)
    report = verify(own_shards)
    assert any(words in fault.what and fault.shard == shard for fault in report.faults), report.faults
    assert json.loads(json.dumps(report.as_dict()))["faults"]


@pytest.mark.parametrize(
    "name", ["tar cut in a member", "missing tar", "missing sidecar", "missing commit", "missing shard"]
)
def test_quick_sees_sizes_and_names(own_shards: Folder, name: str) -> None:
    damage, shard, _ = FAULTS[name]
    damage(own_shards)
    assert shard in {fault.shard for fault in verify(own_shards, quick=True).faults}


def test_no_folder_and_no_shards_are_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        verify(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="no shards here"):
        verify(str(tmp_path))


def test_repair_drops_the_torn_and_builds_the_index_anew(own_shards: Folder) -> None:
    FAULTS["tar cut in a member"][0](own_shards)
    FAULTS["temporary file"][0](own_shards)
    done = repair(verify(own_shards))
    assert len(done) == 3
    assert verify(own_shards).faults == []
    stream = ShardStream(own_shards, global_batch_size=1)
    assert {sample["__key__"][:5] for sample in stream.samples()} == {"00000", "00002"}
    assert np.array_equal(index.load(own_shards).ends(1), scan_ends(own_shards, "00002"))


def test_repair_never_guesses(own_shards: Folder) -> None:
    FAULTS["caption that disagrees"][0](own_shards)
    before = verify(own_shards).faults
    assert before
    assert repair(verify(own_shards)) == []
    assert verify(own_shards).faults == before
