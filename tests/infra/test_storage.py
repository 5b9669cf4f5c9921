"""Folders on a local disk, in memory and on a real S3 server."""

from __future__ import annotations

import os
import pickle
import secrets
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.errors import RunError, UserError
from infra.storage import TEMPORARY_PREFIX, Folder, full_disk_is_named


@pytest.fixture(params=["file", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Folder]:
    if request.param == "file":
        yield Folder(tmp_path / "corpus")
    elif request.param == "memory":
        place = Folder(f"memory://{secrets.token_hex(6)}")
        yield place
        place.delete_tree()
    else:
        yield Folder(request.getfixturevalue("s3_url"))


def test_write_read_list_delete(folder: Folder) -> None:
    assert folder.is_empty()
    assert folder.names() == []
    folder.write("b.tar", b"0123456789")
    folder.write_json("a_stats.json", {"shard": "a", "sign": "é"})
    (folder / "raw").write("c.tar", b"c")
    assert folder.names() == ["a_stats.json", "b.tar"]
    assert folder.names(".tar") == ["b.tar"]
    assert folder.folders() == ["raw"]
    assert folder.read_json("a_stats.json") == {"shard": "a", "sign": "é"}
    assert folder.exists("b.tar")
    assert not folder.exists("c.tar")
    assert folder.size("b.tar") == 10
    folder.delete("b.tar")
    folder.delete("b.tar")
    assert folder.names() == ["a_stats.json"]
    folder.delete_tree()
    assert folder.is_empty()


def test_ranges_and_streams(folder: Folder) -> None:
    content = os.urandom(1 << 20)
    folder.write("00000.tar", content)
    assert folder.read_range("00000.tar", 512, 1536) == content[512:1536]
    assert folder.read_range("00000.tar", len(content) - 5, len(content) + 5) == content[-5:]
    with folder.open("00000.tar") as stream:
        stream.seek(700)
        assert stream.read(9) == content[700:709]
    with pytest.raises(FileNotFoundError):
        folder.read_range("00001.tar", 0, 1)
    with pytest.raises(FileNotFoundError):
        folder.read("00001.tar")


def test_a_long_range_takes_several_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, content = Folder(tmp_path), os.urandom(10_000)
    folder.write("00000.tar", content)
    # Linux brings 2 GiB less a page in one call at the most: here 1,000 bytes, of real files as well.
    pread, preadv = os.pread, os.preadv
    monkeypatch.setattr(os, "pread", lambda file, size, at: pread(file, min(size, 1000), at))
    monkeypatch.setattr(os, "preadv", lambda file, buffers, at: preadv(file, [buffers[0][:1000]], at))
    buffer = bytearray(5000)
    for start, there in ((700, 5000), (6000, 4000), (10_000, 0)):
        assert folder.read_range("00000.tar", start, start + 5000) == content[start : start + 5000]
        assert folder.read_into("00000.tar", start, memoryview(buffer)) == there
        assert buffer[:there] == content[start : start + 5000]


def test_a_file_appears_whole_or_not_at_all(folder: Folder) -> None:
    def torn(name: str, size: int) -> None:
        with folder.create(name) as stream:
            stream.write(os.urandom(size))
            assert not Folder(folder.url).exists("new.tar")
            raise KeyboardInterrupt

    folder.write("old.tar", b"old")
    # Beyond one part of a multipart upload as well as below it.
    for size in (1000, 11 * 2**20):
        for name in ("new.tar", "old.tar"):
            with pytest.raises(KeyboardInterrupt):
                torn(name, size)
    again = Folder(folder.url)
    assert again.names() == ["old.tar"]
    assert again.read("old.tar") == b"old"
    with folder.create("new.tar") as stream:
        for _ in range(11):
            stream.write(b"x" * 2**20)
    assert again.size("new.tar") == 11 * 2**20


def test_another_process_sees_what_was_written(folder: Folder) -> None:
    if folder.url.startswith("memory"):
        pytest.skip("memory is of one process")
    folder.write("a.tar", b"abc")
    assert Folder(folder.url).names() == ["a.tar"]
    script = "import sys; from infra.storage import Folder; Folder(sys.argv[1]).write('b.tar', b'b')"
    subprocess.run([sys.executable, "-c", script, folder.url], check=True, cwd=Path(__file__).parents[2])
    assert folder.names() == ["a.tar", "b.tar"]
    assert folder.exists("b.tar")


def test_folder_travels_as_its_url(folder: Folder) -> None:
    folder.write("a.tar", b"abc")
    assert pickle.loads(pickle.dumps(folder)).read("a.tar") == b"abc"  # noqa: S301 (our own bytes)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "a\\b", "a\0b"])
def test_a_name_cannot_climb_out(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="may not leave its folder"):
        Folder(tmp_path).write(name, b"")


def test_unknown_storage_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="gopher://x"):
        Folder("gopher://x/y")


def test_damaged_json_is_named(tmp_path: Path) -> None:
    Folder(tmp_path).write("a.json", b"{")
    with pytest.raises(RunError, match=r"a\.json: not valid JSON"):
        Folder(tmp_path).read_json("a.json")


def test_a_killed_writer_leaves_only_what_the_sweep_takes(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\nfrom infra.storage import Folder\n"
        "with Folder(sys.argv[1]).create('a.tar') as stream:\n"
        "    stream.write(b'half'); stream.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    assert subprocess.run(command, cwd=Path(__file__).parents[2], check=False).returncode == -9
    folder = Folder(tmp_path)
    assert folder.names() == []
    assert [path.name.startswith(TEMPORARY_PREFIX) for path in tmp_path.iterdir()] == [True]
    assert folder.sweep_temporary() == 1
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named() -> None:
    # /dev/full answers every write as a full disk does.
    with (
        pytest.raises(RunError, match=r"00000\.tar: the disk is full"),
        full_disk_is_named("corpus/raw/00000.tar"),
        Path("/dev/full").open("wb") as stream,
    ):
        stream.write(b"x" * 2**20)


def test_a_listing_of_very_many_files_is_names_and_no_more(tmp_path: Path) -> None:
    number = 5000
    for one in range(number):
        (tmp_path / f"{one:05d}_stats.json").touch()
    (tmp_path / "retry").mkdir()
    folder = Folder(tmp_path)
    tracemalloc.start()
    try:
        names = folder.names("_stats.json")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert names == [f"{one:05d}_stats.json" for one in range(number)]
    assert folder.folders() == ["retry"]
    assert peak < 300 * number


def test_a_file_taken_for_a_folder_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").touch()
    assert Folder(tmp_path / "rows.csv").names() == ["rows.csv"]
    assert Folder(tmp_path / "nowhere").is_empty()
