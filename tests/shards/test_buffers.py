"""Buffers that reads use again: never two holders at once, never more free than is allowed."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import numpy as np

from infra.storage import Folder
from shards.buffers import POOLED_FROM_BYTES, BufferPool
from shards.layout import SIDECAR, Status, sample_key, shard_name, sidecar_schema
from shards.reads import Reader
from shards.stream import ShardStream
from shards.writer import writing

SAMPLES, BODY_BYTES = 60, 20_000


class Holder:
    """Something that a buffer can be lent to."""


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
    for size in range(10, 40):
        holder = Holder()
        pool.lend(pool.borrow(size * 1_000_000), holder)
        del holder
        gc.collect()
    assert sum(map(len, pool._free)) <= 2**26 + 40_000_000


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


def test_long_reads_bring_what_short_ones_do(tmp_path: Path) -> None:
    folder, rng = Folder(tmp_path), np.random.default_rng(0)
    for shard in range(2):
        with writing(folder, shard_name(shard), sidecar_schema(), {}) as writer:
            for row in range(SAMPLES):
                url = f"http://a.example/{shard}/{row}.jpg"
                fields = dict.fromkeys(SIDECAR.names) | {
                    "key": sample_key(shard, row), "url": url, "caption": f"{row}",
                    "status": Status.SUCCESS, "reason": "",
                }  # fmt: skip
                writer.add(fields, rng.bytes(BODY_BYTES))
    stream = ShardStream(folder, global_batch_size=4)
    reader = Reader(folder, stream.index)
    singly = [reader.read(number, number + 1)[0].sample(number) for number in range(2 * SAMPLES)]
    assert max(map(len, singly)) < POOLED_FROM_BYTES
    for _ in range(3):  # from the second time on in memory that held others
        pieces = [piece for first in range(0, 2 * SAMPLES, 40) for piece in reader.read(first, first + 40)]
        assert len({id(piece.data) for piece in pieces}) == len(pieces)
        found = [piece.sample(piece.first + row) for piece in pieces for row in range(len(piece.ends))]
        assert found == singly
        del pieces
