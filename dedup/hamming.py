"""All pairs of 256-bit hashes within a Hamming distance, exactly, by multi-index hashing.

Norouzi, Punjani and Fleet, "Fast Exact Search in Hamming Space with Multi-Index Hashing" (TPAMI 2014), section 3: cut
the hashes into `m` chunks; of two within distance `d = m r + a` either one of the first `a + 1` chunks differs in `r`
bits at most, or one of the others in `r - 1`, or the pigeons would not fit their holes. Here the whole set is joined
with itself: for each chunk the hashes are sorted by its value, and each bucket is compared with those that differ from
it in so few bits. How many chunks there are follows from the number of hashes: many short ones have few buckets to look
into and much in each, few long ones the other way round.

A chunk's bits are `m` apart: neighbouring bits of a perceptual hash depend on each other, and would crowd the buckets.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dedup.hamming_join import counting_sort, join, values_of

Hashes = npt.NDArray[np.uint64]
Pairs = npt.NDArray[np.int64]

BITS = 256
WORDS = BITS // 64
MOST_HASHES = 2**32 - 1
"""Places are held in 32 bits."""
_CHUNKS = range(8, 65)
_MOST_CHUNK_BITS = 28
_MOST_REACH = 4
_LOOK_NS, _COMPARE_NS, _SORT_NS = 30.0, 1.6, 150.0
"""What it takes about to look into a bucket, to compare two hashes, to sort one; measured, and their ratio counts."""
_FIRST_ROOM = 1 << 16
"""Pairs that a range has room for at first; with more of them it is gone through again."""


@dataclass(frozen=True)
class Chunk:
    """One of the `of` parts a hash is cut into: the bits `number`, `number + of`, ...

    Two hashes meet in it where it differs in `reach` bits at most; in none if that is below 0.
    """

    number: int
    of: int
    reach: int

    @property
    def bits(self) -> npt.NDArray[np.int64]:
        """The places of its bits in a hash."""
        return np.arange(self.number, BITS, self.of)

    @property
    def masks(self) -> npt.NDArray[np.int64]:
        """The values that differ from 0 in `reach` bits at most, 0 first."""
        width = len(self.bits)
        counts = range(self.reach + 1)
        of_count = (itertools.combinations(range(width), count) for count in counts)
        return np.array([sum(1 << bit for bit in bits) for one in of_count for bits in one], np.int64)

    @property
    def words(self) -> Hashes:
        """Its bits as a hash in which all others are 0, `[4]`."""
        words = np.zeros(WORDS, np.uint64)
        for bit in self.bits.tolist():
            words[bit // 64] |= np.uint64(1 << bit % 64)
        return words

    def nanoseconds(self, size: int) -> float:
        """Return about how long `size` hashes take in it."""
        width = len(self.bits)
        masks, mean = sum(math.comb(width, count) for count in range(self.reach + 1)), size / 2**width
        filled = 2**width * -math.expm1(-mean)
        return size * _SORT_NS + 2**width + masks / 2 * (filled * _LOOK_NS + size * mean * _COMPARE_NS)


@dataclass(frozen=True)
class Sorted:
    """Hashes sorted by one chunk: those of value `v` lie at `[edges[v], edges[v + 1])`."""

    hashes: Hashes  # [N, 4]
    order: npt.NDArray[np.uint32]  # [N], their places before
    edges: npt.NDArray[np.uint32]  # [values + 1]

    def ranges(self, count: int) -> Iterator[tuple[int, int]]:
        """Cut the values into about `count` ranges `[low, high)` of as many hashes each."""
        values = len(self.edges) - 1
        cuts = np.searchsorted(self.edges[:-1], np.linspace(0, len(self.order), count + 1)[1:-1], side="right")
        bounds = np.unique(np.concatenate([[0], cuts, [values]])).tolist()
        return itertools.pairwise(bounds)


def chunks_for(size: int, distance: int) -> list[Chunk]:
    """Return the chunks by which pairs within `distance` of `size` hashes are found with the least work.

    Raises:
        ValueError: `distance` is not in [0, 256).
    """
    return min(cuts_for(distance), key=lambda chunks: sum(chunk.nanoseconds(size) for chunk in chunks))


def cuts_for(distance: int) -> list[list[Chunk]]:
    """Return the ways to cut hashes so that two within `distance` bits always meet in a chunk.

    Raises:
        ValueError: `distance` is not in [0, 256).
    """
    if not 0 <= distance < BITS:
        raise ValueError(f"distance: {distance} is no number of bits from 0 to {BITS - 1}")
    return [chunks for of in _CHUNKS if (chunks := _cut(of, distance))]


def _cut(of: int, distance: int) -> list[Chunk]:
    reach, rest = divmod(distance, of)
    if math.ceil(BITS / of) > _MOST_CHUNK_BITS or (reach > _MOST_REACH and of != _CHUNKS[-1]):
        return []
    chunks = [Chunk(number, of, reach if number <= rest else reach - 1) for number in range(of)]
    return [chunk for chunk in chunks if chunk.reach >= 0]


def sort_by(hashes: Hashes, chunk: Chunk) -> Sorted:
    """Return `hashes` `[N, 4]` sorted by a chunk.

    Raises:
        ValueError: there are more than 2^32 - 1.
    """
    if len(hashes) > MOST_HASHES:
        raise ValueError(f"{len(hashes)} hashes: {MOST_HASHES} are the most that are joined at a time")
    values = values_of(hashes, chunk.bits)
    return Sorted(*counting_sort(hashes, values, len(chunk.bits)))


def pairs_of_range(by_chunk: Sorted, chunks: list[Chunk], place: int, distance: int, low: int, high: int) -> Pairs:
    """Return the pairs within `distance` whose lower value in the chunk `chunks[place]` is in `[low, high)`.

    Only those that no chunk before it brings together: the union over all chunks and ranges names each pair once, so
    they may be worked on anywhere.

    Returns:
        `[P, 3]`: first place, second place (higher than the first), distance.
    """
    chunk = chunks[place]
    before = np.array([one.words for one in chunks[:place]], np.uint64).reshape(-1, WORDS)
    reaches = np.array([one.reach for one in chunks[:place]], np.int64)
    masks, room = chunk.masks, _FIRST_ROOM
    while True:
        found = np.empty((room, 3), np.int64)
        count = join(
            by_chunk.hashes, by_chunk.order, by_chunk.edges, masks, low, high, distance, before, reaches, found
        )
        if count <= room:
            return found[:count].copy()
        room = count


def all_pairs(hashes: Hashes, distance: int, threads: int = 1) -> Pairs:
    """Return every pair of `hashes` `[N, 4]` within `distance` bits.

    Memory: 36 bytes a hash more than `hashes` itself, the table of a chunk's buckets, and the pairs. Equal hashes all
    pair with each other: join different ones.

    Returns:
        `[P, 3]`: first place, second place (higher than the first), distance; sorted.

    Raises:
        ValueError: `distance` is not in [0, 256), or there are more than 2^32 - 1 hashes.
    """
    chunks = chunks_for(len(hashes), distance)
    found = [np.empty((0, 3), np.int64)]
    with ThreadPoolExecutor(threads, thread_name_prefix="hamming") as pool:
        for place, chunk in enumerate(chunks):
            by_chunk = sort_by(hashes, chunk)
            tasks = [
                pool.submit(pairs_of_range, by_chunk, chunks, place, distance, low, high)
                for low, high in by_chunk.ranges(1 if threads == 1 else 16 * threads)
            ]
            found += [task.result() for task in tasks]
    return sorted_pairs(found)


def sorted_pairs(parts: Iterable[Pairs]) -> Pairs:
    """Return pairs `[P, 3]` of several parts in one order that does not depend on the parts."""
    pairs = np.concatenate(list(parts))
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def distances(first: Hashes, second: Hashes) -> npt.NDArray[np.int64]:
    """Return the Hamming distances of hashes `[P, 4]` and `[P, 4]`, as `[P]`, in bits."""
    return np.bitwise_count(first ^ second).sum(axis=1, dtype=np.int64)
