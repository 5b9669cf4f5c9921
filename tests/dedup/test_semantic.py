"""Pairs of embeddings over a cosine: beside all pairs, where borders of clusters cut them, and where all are equal."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedup.clusters import cluster
from dedup.config import SemanticConfig
from dedup.semantic import all_pairs, equal, looked_at, near_pairs

faiss = pytest.importorskip("faiss")
faiss.omp_set_num_threads(1)  # on busy cores its threads wait for each other longer than they work
Vectors = npt.NDArray[np.floating]
THRESHOLD = 0.95


def unit(rows: Vectors) -> Vectors:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def clustered(size: int, width: int, centres: int, seed: int) -> Vectors:
    """Unit vectors about random centres, one in ten of them near another."""
    draw = np.random.default_rng(seed)
    middle = unit(draw.standard_normal((centres, width)))
    vectors = unit(middle[draw.integers(0, centres, size)] + 0.7 * draw.standard_normal((size, width)) / width**0.5)
    one, other = draw.permutation(size)[: 2 * (size // 20)].reshape(2, -1)
    vectors[other] = unit(vectors[one] + 0.25 * draw.standard_normal((len(one), width)) / width**0.5)
    return vectors.astype(np.float16)


def brute_force(vectors: Vectors, threshold: float) -> set[tuple[int, int]]:
    cosines = np.triu(vectors.astype(np.float32) @ vectors.astype(np.float32).T, 1)
    return set(zip(*(side.tolist() for side in np.nonzero(cosines >= threshold)), strict=True))


@settings(deadline=None, max_examples=20)
@given(
    size=st.integers(1, 120), clusters=st.integers(0, 9), threshold=st.sampled_from((0.3, 0.8, 0.95)),
    block=st.sampled_from((1, 7, 64)), seed=st.integers(0, 99),
)  # fmt: skip
def test_with_all_clusters_as_neighbours_no_pair_is_missed(
    size: int, clusters: int, threshold: float, block: int, seed: int
) -> None:
    vectors = clustered(size, 8, 4, seed)
    pairs = all_pairs(vectors, cluster(vectors, clusters, 120, seed=1), threshold, block)
    found = list(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
    assert found == sorted(brute_force(vectors, threshold))
    exact = vectors.astype(np.float64)
    assert np.allclose(pairs.cosine, (exact[pairs.first] * exact[pairs.second]).sum(axis=1), atol=1e-5)


@pytest.mark.parametrize("neighbours", [0, 2])
def test_each_pair_comes_once_and_is_one(neighbours: int) -> None:
    vectors = clustered(400, 8, 4, seed=5)
    pairs = all_pairs(vectors, cluster(vectors, 12, neighbours, seed=1), 0.7, 32)
    found = list(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
    assert len(found) == len(set(found)) > 1000
    assert set(found) <= brute_force(vectors, 0.7)


def test_few_neighbours_find_nearly_all_pairs() -> None:
    vectors = clustered(4000, 64, 40, seed=2)
    every = brute_force(vectors, THRESHOLD)
    by_neighbours = [
        all_pairs(vectors, cluster(vectors, 0, neighbours, seed=0), THRESHOLD, 512)
        for neighbours in (0, SemanticConfig().neighbours)
    ]
    found = [set(zip(one.first.tolist(), one.second.tolist(), strict=True)) for one in by_neighbours]
    assert len(every) > 100
    assert len(found[1] & every) >= 0.99 * len(every)
    assert len(found[0]) < len(found[1])


def test_the_same_comes_out_again() -> None:
    vectors = clustered(1000, 32, 10, seed=3)
    one, other = (all_pairs(vectors, cluster(vectors, 0, 2, seed=4), THRESHOLD, 64) for _ in range(2))
    assert all(np.array_equal(*sides) for sides in zip(one, other, strict=True))


def test_no_part_is_larger_than_its_block() -> None:
    """300 vectors that all are near each other: 44,850 pairs, of which a part holds 32 x 32 at most."""
    vectors = unit(np.ones((300, 16)) + 0.01 * np.random.default_rng(0).standard_normal((300, 16)))
    parts = list(near_pairs(vectors, cluster(vectors, 3, 2, seed=0), THRESHOLD, 32))
    assert max(len(part.first) for part in parts) <= 32 * 32
    assert sum(len(part.first) for part in parts) == 300 * 299 // 2


def test_a_sample_tells_how_many_pairs_the_clusters_miss() -> None:
    """With every vector in the sample it counts each pair from both its ends."""
    vectors = clustered(800, 16, 40, seed=2)
    clusters = cluster(vectors, 40, 0, seed=0)
    found = len(all_pairs(vectors, clusters, 0.8, 64).first)
    every = len(brute_force(vectors, 0.8))
    assert looked_at(vectors, clusters, 0.8, 64, seed=0, sampled=800) == (2 * every, 2 * found)
    assert found < every
    some_of_all, some_met = looked_at(vectors, clusters, 0.8, 64, seed=0, sampled=200)
    assert abs(some_met / some_of_all - found / every) < 0.1


def test_equal_vectors_have_the_best_placed_for_their_leader() -> None:
    vectors = clustered(50, 8, 4, seed=0)[np.random.default_rng(1).integers(0, 50, 500)]
    place = np.random.default_rng(2).permutation(500)
    leader = equal(vectors, place)
    assert np.array_equal(vectors[leader], vectors)
    assert len(np.unique(leader)) == len(np.unique(vectors, axis=0))
    assert all(place[leader[row]] == place[leader == leader[row]].min() for row in range(500))


def test_none_and_one_have_no_pairs() -> None:
    for size in (0, 1):
        vectors = np.ones((size, 4), np.float16) / 2
        assert len(equal(vectors, np.arange(size))) == size
        assert not len(all_pairs(vectors, cluster(vectors, 0, 4, seed=0), THRESHOLD, 8).first)


def test_without_faiss_one_line_says_what_to_install() -> None:
    lost = (
        "import sys; sys.modules['faiss'] = None\n"
        "import numpy as np\nfrom dedup.clusters import cluster\nfrom infra.errors import UserError\n"
        "try:\n    cluster(np.eye(9), 3, 1, 0)\nexcept UserError as error:\n    print(error)\n"
    )
    told = subprocess.run([sys.executable, "-c", lost], capture_output=True, text=True, check=True).stdout
    assert "pip install 'pairmill[semantic]'" in told
    assert len(told.splitlines()) == 1


@settings(deadline=None, max_examples=30)
@given(
    size=st.integers(2, 120), count=st.integers(2, 9), neighbours=st.integers(0, 3), visited=st.integers(1, 90),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_ranges_of_clusters_name_each_pair_once_with_their_own_vectors_alone(
    size: int, count: int, neighbours: int, visited: int, seed: int
) -> None:
    vectors = clustered(size, 8, 4, seed)
    clusters = cluster(vectors, count, neighbours, seed=1)
    ranges = list(clusters.ranges(visited))
    assert [low for low, _ in ranges] == [0, *(high for _, high in ranges)][:-1]
    assert ranges[-1][1] == clusters.count
    found = []
    for low, high in ranges:
        rows, part = clusters.part(low, high)
        for pairs in near_pairs(vectors[rows], part, 0.8, 7, low, high):
            found += zip(rows[pairs.first].tolist(), rows[pairs.second].tolist(), strict=True)
    whole = all_pairs(vectors, clusters, 0.8, 7)
    assert sorted(found) == list(zip(whole.first.tolist(), whole.second.tolist(), strict=True))
