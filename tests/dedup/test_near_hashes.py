"""Pairs within a Hamming distance, and components: against the plain way, on inputs nobody picked."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedup.components import components
from dedup.perceptual import CHUNKS, all_pairs, distances, pairs_of_chunk, sorted_pairs


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


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), distance=st.integers(0, 40), block=st.sampled_from([64, 1 << 20]))
def test_every_pair_within_the_distance_is_found_once(seed: int, distance: int, block: int) -> None:
    hashes = hashes_with_neighbours(seed, 60, 45)
    np.testing.assert_array_equal(all_pairs(hashes, distance, block), every_pair(hashes, distance))


@pytest.mark.parametrize("distance", [0, 15, 16, 31, 32])
def test_the_chunks_may_be_joined_in_any_order(distance: int) -> None:
    hashes = hashes_with_neighbours(5, 300, 40)
    parts = [pairs_of_chunk(hashes, distance, chunk, 1000) for chunk in reversed(range(CHUNKS))]
    np.testing.assert_array_equal(sorted_pairs(parts), every_pair(hashes, distance))


def test_hashes_of_few_bits_in_crowded_buckets() -> None:
    """Flat pictures crowd the buckets: all chunks but one are zero."""
    draw = np.random.default_rng(1)
    hashes = np.zeros((400, 4), np.uint64)
    hashes[:, 0] = draw.integers(0, 2**20, 400, dtype=np.uint64)
    np.testing.assert_array_equal(all_pairs(hashes, 8, 500), every_pair(hashes, 8))


def test_no_hash_and_one_hash_have_no_pairs() -> None:
    assert all_pairs(np.zeros((0, 4), np.uint64), 31).shape == (0, 3)
    assert all_pairs(np.zeros((1, 4), np.uint64), 31).shape == (0, 3)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), size=st.integers(1, 60))
def test_components_are_those_of_a_walk(data: st.DataObject, size: int) -> None:
    node = st.integers(0, size - 1)
    edges = data.draw(st.lists(st.tuples(node, node), max_size=80))
    first, second = (np.asarray([edge[side] for edge in edges], np.int64) for side in (0, 1))
    label = list(range(size))
    for _ in range(size):
        for a, b in edges:
            label[a] = label[b] = min(label[a], label[b])
    assert components(size, first, second).tolist() == label


def test_a_long_chain_is_one_component() -> None:
    order = np.random.default_rng(0).permutation(20_000)
    assert not components(20_000, order[:-1], order[1:]).any()
