"""Pairs between two sets of hashes: against the plain way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedup import hamming_between
from dedup.hamming import Hashes, Pairs, distances
from dedup.hamming_between import pairs_between


def near_each_other(seed: int, few: int, many: int, most_bits: int) -> tuple[Hashes, Hashes]:
    """Random hashes, and copies of random ones of them with up to `most_bits` bits changed."""
    draw = np.random.default_rng(seed)
    base = draw.integers(0, 2, (few, 256), dtype=np.uint8)
    near = base[draw.integers(0, max(few, 1), many if few else 0)]
    for row in near:
        row[draw.choice(256, draw.integers(0, most_bits + 1), replace=False)] ^= 1
    return tuple(np.packbits(side, axis=1).view(np.uint64).reshape(-1, 4) for side in (base, near))  # type: ignore[return-value]


def every_pair(few: Hashes, many: Hashes, distance: int) -> Pairs:
    first, second = np.indices((len(few), len(many))).reshape(2, -1)
    bits = distances(few[first], many[second])
    return np.stack([first, second, bits], axis=1)[bits <= distance]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    few=st.integers(0, 30),
    distance=st.integers(0, 90),
    threads=st.sampled_from([1, 3]),
)
def test_every_pair_is_found_once(seed: int, few: int, distance: int, threads: int) -> None:
    sides = near_each_other(seed, few, 80, 100)
    np.testing.assert_array_equal(pairs_between(*sides, distance, threads), every_pair(*sides, distance))


@pytest.mark.parametrize("cost", [(0.0, 0.0), (1e9, 0.0), (0.0, 1e9)])
@pytest.mark.parametrize("distance", [0, 15, 31, 64])
def test_however_hashes_are_cut(monkeypatch: pytest.MonkeyPatch, distance: int, cost: tuple[float, float]) -> None:
    """Short chunks and long ones, parts that end within the many, more pairs than there was room for."""
    monkeypatch.setattr(hamming_between, "_LOOK_NS", cost[0])
    monkeypatch.setattr(hamming_between, "_COMPARE_NS", cost[1])
    monkeypatch.setattr(hamming_between, "_HASHES_AT_ONCE", 57)
    monkeypatch.setattr(hamming_between, "_FIRST_ROOM", 3)
    sides = near_each_other(1, 60, 300, distance + 20)
    np.testing.assert_array_equal(pairs_between(*sides, distance, 2), every_pair(*sides, distance))


def test_a_distance_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="no number of bits from 0 to 255"):
        pairs_between(*near_each_other(0, 1, 1, 0), 256)
