"""The compiled inner loops of the joins of hashes: a chunk's values, the sort by them, the comparison of buckets."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, types
from numba.extending import intrinsic


def _count_bits(typing: Any, word: Any) -> Any:
    """Count the bits set in a 64-bit word, in the one instruction that processors have for it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


_bits_set: Any = intrinsic(_count_bits)


@njit(nogil=True, cache=True)
def values_of(hashes: npt.NDArray[np.uint64], bits: npt.NDArray[np.int64]) -> npt.NDArray[np.uint32]:
    """Return for hashes `[N, 4]` the numbers, `[N]`, that their bits at the places `bits` make, lowest first."""
    values = np.empty(len(hashes), np.uint32)
    for row in range(len(hashes)):
        value = np.uint64(0)
        for place in range(len(bits)):
            bit = bits[place]
            value |= ((hashes[row, bit >> 6] >> np.uint64(bit & 63)) & np.uint64(1)) << np.uint64(place)
        values[row] = value
    return values


@njit(nogil=True, cache=True)
def counting_sort(
    hashes: npt.NDArray[np.uint64], values: npt.NDArray[np.uint32], width: int
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    """Return hashes `[N, 4]` sorted by their values of `width` bits, their places before, and the buckets' edges."""
    edges = np.zeros((1 << width) + 1, np.uint32)
    for row in range(len(values)):
        edges[np.int64(values[row]) + 1] += np.uint32(1)
    for value in range(1 << width):
        edges[value + 1] += edges[value]
    order = np.empty(len(values), np.uint32)
    by_value = np.empty_like(hashes)
    for row in range(len(values)):  # afterwards edges[v] is where bucket v ends, and v + 1 begins
        place = edges[values[row]]
        edges[values[row]] = place + np.uint32(1)
        order[place] = row
        for word in range(hashes.shape[1]):
            by_value[place, word] = hashes[row, word]
    for value in range(1 << width, 0, -1):
        edges[value] = edges[value - 1]
    edges[0] = 0
    return by_value, order, edges


@njit(nogil=True, cache=True)
def join(
    hashes: npt.NDArray[np.uint64],
    order: npt.NDArray[np.uint32],
    edges: npt.NDArray[np.uint32],
    masks: npt.NDArray[np.int64],
    low: int,
    high: int,
    distance: int,
    before: npt.NDArray[np.uint64],
    reaches: npt.NDArray[np.int64],
    found: npt.NDArray[np.int64],
) -> int:
    """Compare the buckets of values `[low, high)` with those that differ by one of `masks` and have a higher value.

    Pairs within `distance` go to `found` `[R, 3]`, as far as there is room, unless they agree on one of the chunks
    `before` `[C, 4]` up to its `reaches` `[C]`. Returns how many there are.
    """
    count = 0
    limit = np.uint64(distance)
    place, end, value = np.int64(edges[low]), np.int64(edges[high]), np.int64(low)
    while place < end:
        while np.int64(edges[value + 1]) <= place:
            value += 1
        stop = np.int64(edges[value + 1])
        for mask in masks:
            other = value ^ mask
            first, last = np.int64(edges[other]), np.int64(edges[other + 1])
            if other < value or first == last:
                continue
            for one in range(place, stop):
                a, b, c, d = hashes[one, 0], hashes[one, 1], hashes[one, 2], hashes[one, 3]
                for two in range(one + 1 if one >= first else first, last):
                    bits = _bits_set(a ^ hashes[two, 0]) + _bits_set(b ^ hashes[two, 1])
                    if bits > limit:  # so it is of nearly all that are no pair
                        continue
                    bits += _bits_set(c ^ hashes[two, 2]) + _bits_set(d ^ hashes[two, 3])
                    if bits > limit or _met_before(hashes[one], hashes[two], before, reaches):
                        continue
                    if count < len(found):
                        found[count, 0] = min(order[one], order[two])
                        found[count, 1] = max(order[one], order[two])
                        found[count, 2] = bits
                    count += 1
        place = stop
    return count


@njit(nogil=True, cache=True)
def look_up(
    table: npt.NDArray[np.uint64],
    order: npt.NDArray[np.uint32],
    edges: npt.NDArray[np.uint32],
    masks: npt.NDArray[np.int64],
    hashes: npt.NDArray[np.uint64],
    values: npt.NDArray[np.uint32],
    distance: int,
    before: npt.NDArray[np.uint64],
    reaches: npt.NDArray[np.int64],
    found: npt.NDArray[np.int64],
) -> int:
    """Compare `hashes` `[N, 4]`, of `values` `[N]`, with the buckets of a sorted `table` `[F, 4]`, as `join` does.

    What goes to `found` is the place in the table before its sort, the place in `hashes`, the distance.
    """
    count = 0
    limit = np.uint64(distance)
    for two in range(len(hashes)):
        a, b, c, d = hashes[two, 0], hashes[two, 1], hashes[two, 2], hashes[two, 3]
        for mask in masks:
            value = np.int64(values[two]) ^ mask
            for one in range(np.int64(edges[value]), np.int64(edges[value + 1])):
                bits = _bits_set(a ^ table[one, 0]) + _bits_set(b ^ table[one, 1])
                if bits > limit:
                    continue
                bits += _bits_set(c ^ table[one, 2]) + _bits_set(d ^ table[one, 3])
                if bits > limit or _met_before(table[one], hashes[two], before, reaches):
                    continue
                if count < len(found):
                    found[count, 0] = order[one]
                    found[count, 1] = two
                    found[count, 2] = bits
                count += 1
    return count


@njit(nogil=True, cache=True)
def _met_before(
    one: npt.NDArray[np.uint64],
    two: npt.NDArray[np.uint64],
    before: npt.NDArray[np.uint64],
    reaches: npt.NDArray[np.int64],
) -> bool:
    for chunk in range(len(before)):
        bits = np.uint64(0)
        for word in range(len(one)):
            bits += _bits_set((one[word] ^ two[word]) & before[chunk, word])
        if bits <= np.uint64(reaches[chunk]):
            return True
    return False
