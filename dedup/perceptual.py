"""All pairs of 256-bit hashes within a Hamming distance, exactly, by multi-index hashing.

Norouzi, Punjani and Fleet, "Fast Exact Search in Hamming Space with Multi-Index Hashing" (TPAMI 2014),
section 3: cut the hashes into `m` chunks; two within distance `d` have a chunk in which they differ by
`floor(d / m)` bits at most, or the pigeons would not fit their holes. Here the whole set is joined with
itself: for each chunk the hashes are sorted by it, and each bucket is compared with the buckets that differ
from it in so few bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Pairs = npt.NDArray[np.int64]

BITS = 256
CHUNK_BITS = 16
CHUNKS = BITS // CHUNK_BITS


def distances(first: Hashes, second: Hashes) -> npt.NDArray[np.int64]:
    """Return the Hamming distances of hashes `[P, 4]` and `[P, 4]`, as `[P]`, in bits."""
    return np.bitwise_count(first ^ second).sum(axis=1, dtype=np.int64)


def pairs_of_chunk(hashes: Hashes, distance: int, chunk: int, block: int) -> Pairs:
    """Return the pairs within `distance` that chunk number `chunk` is the first to bring together.

    The union over all `CHUNKS` is complete and names each pair once, so chunks may be worked on anywhere.

    Args:
        hashes: `[N, 4]`, best all different (equal ones meet in every bucket).
        distance: largest distance, in bits.
        chunk: number of the chunk, from 0.
        block: pairs compared at a time, which bounds the memory.

    Returns:
        `[P, 3]`: first row, second row (higher than the first), distance; sorted.
    """
    reach = distance // CHUNKS
    words = np.ascontiguousarray(hashes).view(np.uint16).reshape(-1, CHUNKS)
    order = np.argsort(words[:, chunk], kind="stable")
    values = words[order, chunk]
    found = [np.empty((0, 3), np.int64)]
    for left, right in _candidates(values, _masks(reach), block):
        a, b = order[left], order[right]
        bits = distances(hashes[a], hashes[b])
        near = bits <= distance
        a, b, bits = a[near], b[near], bits[near]
        new = ~_met_before(words, a, b, chunk, reach)
        a, b, bits = a[new], b[new], bits[new]
        found.append(np.stack([np.minimum(a, b), np.maximum(a, b), bits], axis=1))
    return sorted_pairs(found)


def sorted_pairs(parts: Iterable[Pairs]) -> Pairs:
    """Return pairs `[P, 3]` of several parts in one order that does not depend on the parts."""
    pairs = np.concatenate(list(parts))
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def all_pairs(hashes: Hashes, distance: int, block: int = 1 << 20) -> Pairs:
    """Return every pair of `hashes` `[N, 4]` within `distance`, as `pairs_of_chunk` does, in this process."""
    return sorted_pairs(pairs_of_chunk(hashes, distance, chunk, block) for chunk in range(CHUNKS))


def _masks(reach: int) -> list[int]:
    """Return the 16-bit numbers with at most `reach` bits set."""
    return [
        sum(1 << bit for bit in bits)
        for count in range(reach + 1)
        for bits in itertools.combinations(range(CHUNK_BITS), count)
    ]


def _candidates(values: npt.NDArray[np.uint16], masks: list[int], block: int) -> Iterator[tuple[Pairs, Pairs]]:
    """Yield pairs of places whose values differ by one of `masks`, at most about `block` at a time.

    `values` is sorted. For a mask, place `i` pairs with the run of places whose value is `values[i] ^
    mask`; of the two ways to see a pair only that with the lower value first is taken, and inside one
    bucket the lower place.
    """
    edges = np.searchsorted(values, np.arange((1 << CHUNK_BITS) + 1, dtype=np.uint32))
    places = np.arange(len(values))
    for mask in masks:
        partner = values ^ np.uint16(mask)
        start = edges[partner] if mask else places + 1
        stop = edges[partner.astype(np.int64) + 1]
        counts = np.where(partner >= values, stop - start, 0)
        ends = np.cumsum(counts)
        at = 0
        while at < len(values):
            done = int(ends[at - 1]) if at else 0
            until = max(at + 1, int(np.searchsorted(ends, done + block, side="right")))
            some = counts[at:until]
            left = np.repeat(places[at:until], some)
            step = np.arange(len(left)) - np.repeat(ends[at:until] - some - done, some)
            if len(left):
                yield left, np.repeat(start[at:until], some) + step
            at = until


def _met_before(words: npt.NDArray[np.uint16], a: Pairs, b: Pairs, chunk: int, reach: int) -> npt.NDArray[np.bool_]:
    if not chunk:
        return np.zeros(len(a), bool)
    return (np.bitwise_count(words[a, :chunk] ^ words[b, :chunk]) <= reach).any(axis=1)
