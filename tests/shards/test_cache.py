"""The cache of blocks: right bytes whatever happens to its files, within its bound, and nobody else's file touched."""

from __future__ import annotations

import errno
import logging
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import s3fs
from hypothesis import given
from hypothesis import strategies as st

from infra.storage import Folder
from shards import index
from shards.cache import FOLDER, SWEEP_AFTER_S, DiskCache
from shards.loader import Loader
from shards.reads import Reader
from shards.stream import ShardStream

KIB = 2**10
WRITER = """
import sys
from shards.cache import DiskCache
cache, size = DiskCache(sys.argv[1], int(sys.argv[2])), 100_000
print("begun", flush=True)
for number in range(int(sys.argv[3])):
    key = str(number % 60)
    data = cache.get(key, size)
    assert data in (None, key.zfill(4).encode() * (size // 4)), f"wrong bytes for {key}"
    if data is None:
        cache.put(key, key.zfill(4).encode() * (size // 4))
"""


def writer(folder: Path, limit_bytes: int, blocks: int) -> subprocess.Popen[bytes]:
    """A process that reads blocks through a cache, 60 of them in turn, each 100,000 bytes."""
    command = [sys.executable, "-c", WRITER, str(folder), str(limit_bytes), str(blocks)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def files(folder: Path) -> list[Path]:
    return [path for path in (folder / FOLDER).rglob("*") if path.is_file()]


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


def block(key: str) -> bytes:
    return key.zfill(4).encode() * 25_000


def images(stream: ShardStream) -> list[tuple[str, bytes]]:
    return [(sample["__key__"], sample["jpg"]) for sample in stream.samples()]


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 3000)), max_size=20), st.integers(0, 20_000))
def test_what_is_found_is_what_was_put_and_the_bound_holds(
    tmp_path_factory: pytest.TempPathFactory, puts: list[tuple[int, int]], limit: int
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    cache, put = DiskCache(folder, limit), {}
    for key, size in puts:
        put[f"{key} {size}"] = bytes([key]) * size
        cache.put(f"{key} {size}", put[f"{key} {size}"])
        assert held(folder) <= limit
    for name, data in put.items():
        assert cache.get(name, len(data)) in (None, data)


@pytest.mark.parametrize("damage", ["cut", "flipped", "longer", "another's", "empty"])
def test_a_damaged_file_is_a_miss_and_is_replaced(tmp_path: Path, damage: str) -> None:
    cache = DiskCache(tmp_path, 2**20)
    cache.put("a", block("a"))
    (path,) = files(tmp_path)
    content = path.read_bytes()
    cache.put("b", block("a"))
    (other,) = {*files(tmp_path)} - {path}
    bad = {
        "cut": content[:-1], "longer": content + b"x", "empty": b"",
        "flipped": content[:500] + b"\xff" + content[501:], "another's": other.read_bytes(),
    }  # fmt: skip
    path.write_bytes(bad[damage])
    assert cache.get("a", 100_000) is None
    cache.put("a", block("a"))
    assert cache.get("a", 100_000) == block("a")


def test_the_least_recently_used_goes_first_and_what_this_run_used_stays(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 450_000)
    for number in range(4):
        cache.put(str(number), block(str(number)))
        for age, path in enumerate(sorted(files(tmp_path), key=lambda path: path.stat().st_mtime), 1):
            os.utime(path, (1e9 - age, 1e9 + age))
    assert cache.get("0", 100_000) == block("0")
    cache.put("4", block("4"))
    kept = {key for key in "01234" if cache.get(key, 100_000) is not None}
    assert {"0", "4"} <= kept
    assert "1" not in kept
    of_this_run = DiskCache(tmp_path, 450_000, since_s=time.time() - 60)
    for number in range(5, 20):
        of_this_run.put(str(number), block(str(number)))
    assert kept <= {key for key in "01234" if cache.get(key, 100_000) is not None}
    assert held(tmp_path) <= 450_000


def test_processes_share_one_cache_within_its_bound(tmp_path: Path) -> None:
    limit = 3_000_000
    processes = [writer(tmp_path, limit, 300) for _ in range(3)]
    most = 0
    while any(process.poll() is None for process in processes):
        total = 0
        for path in files(tmp_path):
            try:
                total += path.stat().st_size
            except FileNotFoundError:
                continue
        most = max(most, total)
        time.sleep(0.01)
    for process in processes:
        process.communicate()
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert limit / 2 < max(most, held(tmp_path)) <= limit + len(processes) * 101_000
    assert not [path for path in files(tmp_path) if path.suffix == ".part"]


def test_a_killed_writer_leaves_a_cache_of_use(tmp_path: Path) -> None:
    for _ in range(3):
        process = writer(tmp_path, 3_000_000, 10**9)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(secrets.randbelow(100) / 1000)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    left = DiskCache(tmp_path, 3_000_000)
    (tmp_path / FOLDER / "00").mkdir(exist_ok=True)
    dead, alive = (tmp_path / FOLDER / "00" / f"{'0' * 40}.block-0000000{number}.part" for number in (1, 2))
    for path in (dead, alive):
        path.write_bytes(b"half a blo")
    os.utime(dead, (0, time.time() - SWEEP_AFTER_S - 60))
    left.put("new", block("new"))
    assert left.get("new", 100_000) == block("new")
    assert alive.exists()
    assert not dead.exists()
    again = writer(tmp_path, 3_000_000, 100)
    again.communicate()
    assert again.returncode == 0


def test_other_peoples_files_stay(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 250_000)
    cache.put("a", block("a"))
    (ours,) = files(tmp_path)
    others = [
        tmp_path / "thesis.tex", tmp_path / "ab" / f"{'a' * 40}.block", tmp_path / FOLDER / "README",
        tmp_path / FOLDER / "notes" / f"{'a' * 40}.block", ours.with_name("A" * 40 + ".block"),
        ours.with_name(ours.name + ".bak"), ours.with_name(ours.name + "-0000.part"),
    ]  # fmt: skip
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"0" * 300_000)
        os.utime(path, (0, 0))
    for number in range(10):
        cache.put(str(number), block(str(number)))
    assert not ours.exists()
    assert all(path.stat().st_size == 300_000 for path in others)


def test_an_unwritable_folder_costs_the_cache_and_not_the_run(
    tmp_path: Path, shards_of: Callable[..., Folder], caplog: pytest.LogCaptureFixture
) -> None:
    folder = shards_of(40, 30, 26)
    (tmp_path / "file").write_bytes(b"")
    with caplog.at_level(logging.WARNING, logger="pairmill"):
        got = images(ShardStream(folder, global_batch_size=8, cache_folder=tmp_path / "file"))
    assert got == images(ShardStream(folder, global_batch_size=8))
    assert caplog.text.count("this cache cannot be") == 1


def test_a_full_disk_costs_the_cache_and_not_the_run(
    tmp_path: Path, shards_of: Callable[..., Folder], caplog: pytest.LogCaptureFixture
) -> None:
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no right to mount a small disk here")
    try:
        folder = shards_of(40, 30, 26)
        with caplog.at_level(logging.WARNING, logger="pairmill"):
            got = images(ShardStream(folder, global_batch_size=8, cache_folder=tmp_path))
        assert got == images(ShardStream(folder, global_batch_size=8))
        assert caplog.text.count(f"this cache cannot be written to ({os.strerror(errno.ENOSPC)})") == 1
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_block_larger_than_the_cache_is_told_once(
    tmp_path: Path, shards_of: Callable[..., Folder], caplog: pytest.LogCaptureFixture
) -> None:
    folder = shards_of(40, 30, 26)
    with caplog.at_level(logging.WARNING, logger="pairmill"):
        got = images(ShardStream(folder, global_batch_size=8, cache_folder=tmp_path, cache_bytes=100))
    assert got == images(ShardStream(folder, global_batch_size=8))
    assert caplog.text.count("this cache of 100 bytes is too small") == 1


@given(st.integers(1, 40), st.integers(0, 95), st.integers(1, 96))
def test_any_run_through_the_cache_is_the_run_without(
    tmp_path_factory: pytest.TempPathFactory, shards_of: Callable[..., Folder], size: int, first: int, count: int
) -> None:
    folder = shards_of(40, 30, 26)
    entries, stop = index.load(folder), min(96, first + count)
    cache = DiskCache(tmp_path_factory.getbasetemp() / "any-run", 2**24)
    plain, cached = Reader(folder, entries), Reader(folder, entries, cache=cache, block_samples=size)
    for _ in range(2):
        for one, other in zip(plain.read(first, stop), cached.read(first, stop), strict=True):
            assert one == other


def test_a_shard_that_changed_is_read_anew(tmp_path: Path, own_shards: Folder) -> None:
    stream = ShardStream(own_shards, global_batch_size=4, cache_folder=tmp_path / "cache")
    before = dict(images(stream))
    tar = Path(own_shards.path("00001.tar"))
    content = tar.read_bytes()
    at = content.index(before["000010000"])
    changed = before["000010000"][:-1] + b"?"
    tar.write_bytes(content[:at] + changed + content[at + len(changed) :])
    for name in ("00001.parquet", "00001_stats.json"):
        own_shards.delete(name)
    index.save(own_shards, index.build(own_shards, names=["00000", "00001", "00002"], digests=True))
    after = dict(images(ShardStream(own_shards, global_batch_size=4, cache_folder=tmp_path / "cache")))
    assert after["000010000"] == changed
    assert after | {"000010000": before["000010000"]} == before


def test_a_shard_without_a_digest_is_not_cached(
    tmp_path: Path, own_shards: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    entries = index.build(own_shards)
    for name in own_shards.names(".json"):
        own_shards.delete(name)
    index.save(own_shards, index.build(own_shards))
    with caplog.at_level(logging.WARNING, logger="pairmill"):
        got = images(ShardStream(own_shards, global_batch_size=4, cache_folder=tmp_path / "cache"))
    assert len(got) == entries.samples // 4 * 4
    assert files(tmp_path / "cache") == []
    assert caplog.text.count("without a digest in the index") == 1


def test_the_second_epoch_needs_no_store(tmp_path: Path, s3_gateway: Any, shards_of: Callable[..., Folder]) -> None:
    local, url = shards_of(40, 30, 26), s3_gateway.url(secrets.token_hex(6))
    for name in local.names():
        Folder(url).write(name, local.read(name))
    options: dict[str, Any] = {"global_batch_size": 12, "lanes": 4, "remainder": "keep"}
    there = ShardStream(url, cache_folder=tmp_path, patience_s=1.0, **options)
    here = ShardStream(local, **options)
    assert images(there) == images(here)
    s3_gateway.stop()
    try:
        s3fs.S3FileSystem.clear_instance_cache()
        assert images(there) == images(here)
        as_one = [[sample["__key__"] for sample in batch] for batch in here]
        loaded = Loader(there, workers=2, transform=lambda batch: [sample["__key__"] for sample in batch])
        assert list(loaded) == as_one
    finally:
        s3_gateway.start()


def test_what_is_no_file_is_passed_over(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, KIB**3)
    cache.put("1", block("1"))
    (path,) = files(tmp_path)
    kept = path.rename(tmp_path / "elsewhere")
    os.mkfifo(path)
    assert cache.get("1", 100_000) is None
    path.unlink()
    path.symlink_to(kept)
    assert cache.get("1", 100_000) is None
    cache.put("1", block("1"))
    assert cache.get("1", 100_000) == block("1")
    assert not path.is_symlink()
