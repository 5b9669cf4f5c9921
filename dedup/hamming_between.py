"""All pairs of a few hashes and many others within a Hamming distance, exactly.

As in `dedup.hamming`, but for two sets: the few are sorted by each chunk, once, and each of the many looks into the
buckets that it may have a pair in (Norouzi, Punjani and Fleet 2014, section 3).
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dedup.hamming import (
    WORDS,
    Chunk,
    Hashes,
    Pairs,
    Sorted,
    cuts_for,
    sort_by,
    sorted_pairs,
)
from dedup.hamming_join import look_up, values_of

_VALUE_NS, _LOOK_NS, _COMPARE_NS, _FILL_NS = 30.0, 3.0, 1.6, 2.0
"""What it takes about to make a chunk's value of a hash, to look into a bucket of a table that the cache holds, to
compare two hashes, to lay out a bucket; measured, and their ratio counts."""
_MOST_TABLE_BITS = 20
_HASHES_AT_ONCE = 65_536
_FIRST_ROOM = 1 << 12


def pairs_between(few: Hashes, many: Hashes, distance: int, threads: int = 1) -> Pairs:
    """Return every pair of one of `few` `[F, 4]` and one of `many` `[N, 4]` within `distance` bits.

    Memory: a few MB a thread, and the pairs.

    Returns:
        `[P, 3]`: place in `few`, place in `many`, distance; sorted.

    Raises:
        ValueError: `distance` is not in [0, 256), or `few` are more than 2^32 - 1.
    """
    found = [np.empty((0, 3), np.int64)]
    if not len(few) or not len(many):
        return found[0]
    chunks = min(
        (cut for cut in cuts_for(distance) if len(cut[0].bits) <= _MOST_TABLE_BITS),
        key=lambda cut: sum(_nanoseconds(chunk, len(few), len(many)) for chunk in cut),
    )
    tables = [sort_by(few, chunk) for chunk in chunks]
    with ThreadPoolExecutor(threads, thread_name_prefix="hamming") as pool:
        tasks = [
            pool.submit(_pairs_of_part, tables, chunks, many[at : at + _HASHES_AT_ONCE], at, distance)
            for at in range(0, len(many), _HASHES_AT_ONCE)
        ]
        found += [task.result() for task in tasks]
    return sorted_pairs(found)


def _nanoseconds(chunk: Chunk, few: int, many: int) -> float:
    width = len(chunk.bits)
    masks = sum(math.comb(width, count) for count in range(chunk.reach + 1))
    return many * (_VALUE_NS + masks * (_LOOK_NS + few / 2**width * _COMPARE_NS)) + 2**width * _FILL_NS


def _pairs_of_part(tables: list[Sorted], chunks: list[Chunk], hashes: Hashes, start: int, distance: int) -> Pairs:
    """Return the pairs of the tables and some of the many, of which the first has the place `start`."""
    words = np.array([chunk.words for chunk in chunks], np.uint64).reshape(-1, WORDS)
    reaches = np.array([chunk.reach for chunk in chunks], np.int64)
    found = [np.empty((0, 3), np.int64)]
    for place, (table, chunk) in enumerate(zip(tables, chunks, strict=True)):
        values, masks, room = values_of(hashes, chunk.bits), chunk.masks, _FIRST_ROOM
        while True:
            pairs = np.empty((room, 3), np.int64)
            count = look_up(
                table.hashes, table.order, table.edges, masks, hashes, values, distance,
                words[:place], reaches[:place], pairs,
            )  # fmt: skip
            if count <= room:
                break
            room = count
        found.append(pairs[:count])
    joined = np.concatenate(found)
    joined[:, 1] += start
    return joined
