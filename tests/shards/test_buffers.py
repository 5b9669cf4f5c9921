"""Buffers that reads use again: never two holders at once, never more free than is allowed."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest

from infra.storage import Folder
from shards.buffers import POOLED_FROM_BYTES, BufferPool
from shards.index import load_or_scan
from shards.kept import KeepList
from shards.layout import SIDECAR, Status, sample_key, shard_name, sidecar_schema
from shards.reads import Reader
from shards.writer import writing

SAMPLES, BODY_BYTES = 60, 20_000


class Holder:
    """Something that a buffer can be lent to."""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Two shards of pictures so large that a block of them is read to a buffer."""
    folder, rng = Folder(tmp_path_factory.mktemp("large")), np.random.default_rng(0)
    for shard in range(2):
        with writing(folder, shard_name(shard), sidecar_schema(), {}) as writer:
            for row in range(SAMPLES):
                url = f"http://a.example/{shard}/{row}.jpg"
                fields = dict.fromkeys(SIDECAR.names) | {
                    "key": sample_key(shard, row), "url": url, "caption": f"{row}",
                    "status": Status.SUCCESS, "reason": "",
                }  # fmt: skip
                writer.add(fields, rng.bytes(BODY_BYTES))
    return folder


def test_a_buffer_is_lent_again_only_when_its_holder_is_gone() -> None:
    pool, holder = BufferPool(), Holder()
    first = pool.borrow(1_000_000)
    pool.lend(first, holder)
    assert pool.borrow(1_000_000) is not first
    del holder
    gc.collect()
    assert pool.borrow(5_000_000) is not first
    assert pool.borrow(990_000) is first


def test_free_buffers_are_bounded() -> None:
    pool = BufferPool()
    for size in range(10, 24):
        holder = Holder()
        pool.lend(pool.borrow(size * 1_000_000), holder)
        del holder
        gc.collect()
    assert sum(map(len, pool._free)) <= 2**26


def test_many_let_go_at_once_are_bounded_too() -> None:
    pool, holders = BufferPool(), [Holder() for _ in range(30)]
    for holder in holders:
        pool.lend(pool.borrow(10_000_000), holder)
    holders.clear()
    gc.collect()
    assert 2**25 < sum(map(len, pool._free)) <= 2**26


def test_gaps_are_not_held_and_the_next_read_takes_the_same_buffer(large: Folder) -> None:
    entries, pool = load_or_scan(large), BufferPool()
    keep = KeepList(range(0, 2 * SAMPLES, 10), 2 * SAMPLES)
    reader, whole = Reader(large, entries, kept=keep, buffers=pool), Reader(large, entries, buffers=pool)
    kept = reader.read(0, 51)
    (buffer,) = pool._free
    assert sum(len(piece.data) for piece in kept) == reader.size(0, 51) < entries.tar_bytes / 15
    assert kept[0].sample(10) == whole.read(10, 11)[0].sample(10)
    (piece,) = whole.read(0, 51)
    assert piece.data is buffer
    assert not pool._free
    del piece, kept
    assert pool._free == [buffer]


def test_a_read_that_comes_short_is_no_read(large: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = load_or_scan(large)
    reader, whole = Reader(large, entries, 0.3), Reader(large, entries).read(0, 40)[0]
    read_into, short = Folder.read_into, [1]

    def cut(folder: Folder, name: str, start: int, buffer: memoryview) -> int:
        """Read as a network file system that is being written to: less than there is."""
        return read_into(folder, name, start, buffer[: len(buffer) - 7] if short and short.pop() else buffer)

    monkeypatch.setattr(Folder, "read_into", cut)
    (piece,) = reader.read(0, 40)
    assert (piece.fault, [piece.sample(row) for row in range(40)]) == (None, [whole.sample(row) for row in range(40)])
    short += [1] * 100
    (piece,) = reader.read(0, 40)
    assert "bytes came where" in str(piece.fault)


def test_threads_never_share_a_buffer() -> None:
    pool, problems = BufferPool(), []

    def work(number: int) -> None:
        for turn in range(300):
            holder, buffer = Holder(), pool.borrow(300_000)
            mark = bytes([number, turn % 256]) * 100
            buffer[:200] = mark
            if buffer[:200] != mark:
                problems.append((number, turn))
            pool.lend(buffer, holder)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


def test_long_reads_bring_what_short_ones_do(large: Folder) -> None:
    reader = Reader(large, load_or_scan(large))
    singly = [reader.read(number, number + 1)[0].sample(number) for number in range(2 * SAMPLES)]
    assert max(map(len, singly)) < POOLED_FROM_BYTES
    for _ in range(3):  # from the second time on in memory that held others
        pieces = [piece for first in range(0, 2 * SAMPLES, 40) for piece in reader.read(first, first + 40)]
        assert len({id(piece.data) for piece in pieces}) == len(pieces)
        found = [piece.sample(piece.first + row) for piece in pieces for row in range(len(piece.ends))]
        assert found == singly
        del pieces
