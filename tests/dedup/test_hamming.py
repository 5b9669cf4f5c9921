"""Pairs within a Hamming distance: against the plain way, on inputs nobody picked."""

from __future__ import annotations

from itertools import zip_longest

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedup import hamming
from dedup.hamming import BITS, Chunk, all_pairs, chunks_for, distances, pairs_of_range, sort_by, sorted_pairs


def hashes_with_neighbours(seed: int, count: int, most_bits: int) -> npt.NDArray[np.uint64]:
    draw = np.random.default_rng(seed)
    base = draw.integers(0, 2, (count, 256), dtype=np.uint8)
    near = base.copy()
    for row in near:
        row[draw.choice(256, draw.integers(0, most_bits + 1), replace=False)] ^= 1
    return np.packbits(np.concatenate([base, near]), axis=1).view(np.uint64)


def every_pair(hashes: npt.NDArray[np.uint64], distance: int) -> npt.NDArray[np.int64]:
    first, second = np.triu_indices(len(hashes), 1)
    bits = distances(hashes[first], hashes[second])
    near = bits <= distance
    return np.stack([first[near], second[near], bits[near]], axis=1)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), distance=st.integers(0, 64), threads=st.sampled_from([1, 3]))
def test_every_pair_within_the_distance_is_found_once(seed: int, distance: int, threads: int) -> None:
    hashes = hashes_with_neighbours(seed, 60, 70)
    np.testing.assert_array_equal(all_pairs(hashes, distance, threads), every_pair(hashes, distance))


@pytest.mark.parametrize("distance", [0, 10, 15, 16, 31, 32, 64])
@pytest.mark.parametrize("size", [10**4, 10**6, 10**7])
def test_the_cuts_for_many_hashes_find_the_same(monkeypatch: pytest.MonkeyPatch, size: int, distance: int) -> None:
    """What is cut for millions is tried on few; pairs as far from each other as the holes of the pigeons allow."""
    monkeypatch.setattr(hamming, "_MOST_CHUNK_BITS", 20)  # the tables of longer chunks take seconds to make
    chunks = chunks_for(size, distance)
    hashes = spread_differences(chunks, distance)
    monkeypatch.setattr(hamming, "chunks_for", lambda *of: chunks)
    np.testing.assert_array_equal(all_pairs(hashes, distance), every_pair(hashes, distance))


def spread_differences(chunks: list[Chunk], distance: int) -> npt.NDArray[np.uint64]:
    """Pairs that differ in `distance` bits or one more, spread over the chunks of a cut as evenly as can be."""
    draw = np.random.default_rng(distance)
    by_chunk = [range(number, BITS, chunks[0].of) for number in range(chunks[0].of)]
    order = [bit for turn in zip_longest(*by_chunk, fillvalue=-1) for bit in turn if bit >= 0]
    rows = []
    for _ in range(40):
        one = draw.integers(0, 2, BITS, dtype=np.uint8)
        rows.append(one)
        for bits in (distance, distance + 1):
            shift = int(draw.integers(0, BITS - bits))
            other = one.copy()
            other[order[shift : shift + bits]] ^= 1
            rows.append(other)
    return np.packbits(np.stack(rows), axis=1, bitorder="little").view(np.uint64)


@pytest.mark.parametrize("distance", [0, 15, 16, 31])
def test_chunks_and_ranges_may_be_joined_in_any_order(distance: int) -> None:
    hashes = hashes_with_neighbours(5, 300, 40)
    chunks = chunks_for(len(hashes), distance)
    parts = [
        pairs_of_range(by_chunk, chunks, place, distance, low, high)
        for place, by_chunk in reversed(list(enumerate(sort_by(hashes, chunk) for chunk in chunks)))
        for low, high in reversed(list(by_chunk.ranges(7)))
    ]
    np.testing.assert_array_equal(sorted_pairs(parts), every_pair(hashes, distance))


def test_ranges_cover_every_value_once() -> None:
    by_chunk = sort_by(hashes_with_neighbours(3, 500, 10), Chunk(0, 20, 1))
    ranges = list(by_chunk.ranges(9))
    assert [low for low, _ in ranges] == [0, *(high for _, high in ranges[:-1])]
    assert ranges[-1][1] == 2 ** len(Chunk(0, 20, 1).bits)


def test_hashes_of_few_bits_in_crowded_buckets() -> None:
    """Flat pictures crowd the buckets; their pairs are more than a range has room for at first."""
    draw = np.random.default_rng(1)
    hashes = np.zeros((700, 4), np.uint64)
    hashes[:, 0] = draw.permutation(2**20)[:700].astype(np.uint64)
    found = all_pairs(hashes, 20)
    assert len(found) > hamming._FIRST_ROOM
    np.testing.assert_array_equal(found, every_pair(hashes, 20))


@pytest.mark.parametrize("threads", [1, 2])
def test_no_hash_and_one_hash_have_no_pairs(threads: int) -> None:
    assert all_pairs(np.zeros((0, 4), np.uint64), 31, threads).shape == (0, 3)
    assert all_pairs(np.zeros((1, 4), np.uint64), 31, threads).shape == (0, 3)


@pytest.mark.parametrize("distance", [-1, 256])
def test_a_distance_that_cannot_be(distance: int) -> None:
    with pytest.raises(ValueError, match="no number of bits"):
        all_pairs(np.zeros((2, 4), np.uint64), distance)
