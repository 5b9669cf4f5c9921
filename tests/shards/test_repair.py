"""Repair drops what Pairmill made and what is torn now; all else is named and left."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.storage import Folder
from shards import index
from shards.layout import DEDUP, INDEX, RAW, SIGNATURES, STATS_SUFFIX
from shards.manifest import Manifest
from shards.repair import repair
from shards.verify import verify


def write_tar(path: Path, rows: int = 3, json_text: bytes = b"{}") -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for row in range(rows):
            for extension, content in (("jpg", b"picture"), ("txt", b"words"), ("json", json_text)):
                info = tarfile.TarInfo(f"{path.stem}{row:04d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def foreign(tmp_path: Path) -> Folder:
    """Two tars with commits of another tool, and one without."""
    folder = Folder(tmp_path / "foreign")
    Path(folder.url).mkdir()
    for name in ("00000", "00001", "mine"):
        write_tar(Path(folder.path(f"{name}.tar")))
    for name in ("00000", "00001"):
        folder.write_json(name + STATS_SUFFIX, {"count": 3, "successes": 3})
    return folder


def grow(folder: Folder, name: str) -> None:
    with Path(folder.path(f"{name}.tar")).open("ab") as tar:
        tar.write(b"13 more bytes")


def all_files(folder: Folder) -> dict[str, bytes]:
    return {name: folder.read(name) for name in folder.names() if name != ".lock"}


def test_nothing_of_a_foreign_folder_is_dropped(foreign: Folder, caplog: pytest.LogCaptureFixture) -> None:
    grow(foreign, "00001")
    before = all_files(foreign)
    report = verify(foreign)
    assert {fault.shard for fault in report.faults if fault.kind == "torn"} == {"00001", "mine"}
    with caplog.at_level(logging.WARNING, logger="pairmill"):
        assert repair(report) == []
    assert all_files(foreign) == before
    assert "delete by hand: 00001_stats.json, 00001.tar" in caplog.text
    assert "delete by hand: mine.tar" in caplog.text


def test_a_foreign_shard_among_ours_is_left(own_shards: Folder) -> None:
    write_tar(Path(own_shards.path("mine.tar")))
    write_tar(Path(own_shards.path("00007.tar")))
    own_shards.write_json("00007" + STATS_SUFFIX, {"count": 3, "successes": 3})
    for name in ("00001", "00007"):
        grow(own_shards, name)
    repair(verify(own_shards))
    there = own_shards.names(".tar")
    assert there == ["00000.tar", "00002.tar", "00007.tar", "mine.tar"]


def test_in_a_stage_what_has_no_commit_is_dropped_and_made_again(
    tmp_path: Path, deduplicated_corpus: Callable[..., Folder]
) -> None:
    corpus = deduplicated_corpus(str(tmp_path / "corpus"), [4, 5, 6], [])
    raw = corpus / RAW
    raw.delete("00001" + STATS_SUFFIX)
    raw.write("00002" + STATS_SUFFIX, b"{")
    write_tar(Path(raw.path("mine.tar")))
    signatures = corpus / DEDUP / SIGNATURES
    for number in range(3):
        signatures.write(f"{number:05d}.parquet", b"")
    repair(verify(raw))
    assert raw.names(".tar") == ["00000.tar", "mine.tar"]
    assert signatures.names() == ["00000.parquet"]
    assert not Manifest.existing(corpus).is_done(RAW)


def test_a_commit_that_came_after_the_report_keeps_its_shard(
    tmp_path: Path, deduplicated_corpus: Callable[..., Folder]
) -> None:
    corpus = deduplicated_corpus(str(tmp_path / "corpus"), [4, 5], [])
    raw = corpus / RAW
    index.save(raw, index.build(raw))
    commit = raw.read("00001" + STATS_SUFFIX)
    raw.delete("00001" + STATS_SUFFIX)
    report = verify(raw)
    assert {fault.kind for fault in report.faults if fault.shard == "00001"} == {"torn", "missing"}
    raw.write("00001" + STATS_SUFFIX, commit)
    assert not any("dropped" in line for line in repair(report))
    assert verify(raw).ok
    assert raw.names(".tar") == ["00000.tar", "00001.tar"]
    assert Manifest.existing(corpus).is_done(RAW)


def test_a_torn_shard_that_was_written_anew_is_kept(own_shards: Folder) -> None:
    whole = own_shards.read("00001.tar")
    own_shards.write("00001.tar", whole[:5000])
    report = verify(own_shards)
    own_shards.write("00001.tar", whole)
    repair(report)
    assert verify(own_shards).ok
    assert verify(own_shards).shards == 3


@pytest.mark.parametrize("kind", ["a folder", "a loop of links"])
def test_a_shard_that_cannot_be_opened_hides_no_other(
    own_shards: Folder, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    tar = Path(own_shards.path("00001.tar"))
    tar.unlink()
    if kind == "a folder":
        tar.mkdir()
    else:
        tar.symlink_to(tar.name)
    grow(own_shards, "00002")
    report = verify(own_shards)
    assert [fault.shard for fault in report.faults if fault.kind == "unreadable"] == ["00001"]
    assert any(fault.shard == "00002" and fault.kind == "torn" for fault in report.faults)
    with caplog.at_level(logging.WARNING, logger="pairmill"):
        assert [line.split(";")[0] for line in repair(report)] == ["dropped the torn shard 00002"]
    assert f"{INDEX} is left as it is until these are mended: 00001" in caplog.text
    assert own_shards.exists("00001" + STATS_SUFFIX)
    if kind == "a folder":
        tar.rmdir()
    else:
        tar.unlink()
    repair(verify(own_shards))
    assert verify(own_shards).ok


def captions_in_lists(folder: Folder) -> None:
    rows = {"key": ["000000000"], "status": ["success"], "caption": [["a", "b"]]}
    pq.write_table(pa.table(rows), folder.path("00000.parquet"))


def lists_for_keys(folder: Folder) -> None:
    rows = {"key": [["000000000"]], "status": ["success"], "caption": ["a"]}
    pq.write_table(pa.table(rows), folder.path("00000.parquet"))


def deep_json(folder: Folder) -> None:
    write_tar(Path(folder.path("00000.tar")), json_text=b"[" * 100_000)


def commit(content: bytes) -> Callable[[Folder], None]:
    return lambda folder: folder.write("00000" + STATS_SUFFIX, content)


STRANGE: list[tuple[Callable[[Folder], None], str]] = [
    (lists_for_keys, "cannot be checked (TypeError"),
    (deep_json, "its json cannot be decoded"),
    (commit(b"[" * 100_000), "recursion"),
    (commit(json.dumps({"successes": None}).encode()), "counts None samples"),
    (commit(json.dumps({"successes": "three"}).encode()), "counts 'three' samples"),
]


@pytest.mark.parametrize(("change", "words"), STRANGE)
def test_strange_values_are_faults_of_their_shard(foreign: Folder, change: Callable[..., None], words: str) -> None:
    change(foreign)
    grow(foreign, "00001")
    report = verify(foreign)
    assert any(words in fault.what and fault.shard == "00000" for fault in report.faults), report.faults
    assert any(fault.shard == "00001" for fault in report.faults)
    if change not in (lists_for_keys, deep_json):
        assert any(words in fault.what for fault in verify(foreign, quick=True).faults)


def test_captions_that_are_lists_are_no_fault_of_a_foreign_folder(foreign: Folder) -> None:
    before = verify(foreign).faults
    captions_in_lists(foreign)
    assert [fault for fault in verify(foreign).faults if "caption" in fault.what or "checked" in fault.what] == []
    assert before
