"""K-means over unit vectors: which clusters each of them is near to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from infra.errors import UserError

Rows = npt.NDArray[np.int64]


class Vectors(Protocol):
    """A matrix of unit vectors `[N, D]`: an array, or what gives arrays of the rows that it is asked for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """`N` and `D`."""

    @property
    def dtype(self) -> Any:
        """The type of a number."""

    def __len__(self) -> int:
        """`N`."""

    def __getitem__(self, rows: Any, /) -> Any:
        """Return an array of some rows, `[n, D]`."""


ITERATIONS, TRAINED_ON = 10, 64
"""Rounds of k-means, and vectors of each cluster that it looks at; more of either found no more pairs."""
ASSIGNED_AT_ONCE = 65_536
"""Vectors that are compared with all centroids at a time."""


@dataclass(frozen=True)
class Clusters:
    """For each of `N` vectors its own cluster and its next nearest ones, by closeness: `nearest` `[N, 1 + n]`."""

    nearest: npt.NDArray[np.int32]
    count: int

    @property
    def own(self) -> npt.NDArray[np.int32]:
        """The cluster of each vector, `[N]`."""
        return self.nearest[:, 0]

    def visits(self, low: int = 0, high: int | None = None) -> Iterator[tuple[int, Rows, Rows]]:
        """Yield each cluster that is not empty, its vectors, and those of others near it; of `low` to before `high`."""
        order, edges = self._by_cluster
        width = self.nearest.shape[1]
        sizes = np.bincount(self.own, minlength=self.count)
        for cluster in (low + np.flatnonzero(sizes[low:high])).tolist():
            rows = order[edges[cluster] : edges[cluster + 1]] // width
            yield cluster, rows[: sizes[cluster]], rows[sizes[cluster] :]

    def part(self, low: int, high: int) -> tuple[Rows, Clusters]:
        """Return the vectors that visits of the clusters from `low` to before `high` yield, and what is known of these.

        Their clusters have the numbers that they have here, and visits of them yield the same in the same order, but
        for the vectors' numbers, which are places among those returned.
        """
        order, edges = self._by_cluster
        rows = np.unique(order[edges[low] : edges[high]] // self.nearest.shape[1])
        return rows, Clusters(self.nearest[rows], self.count)

    def ranges(self, vectors: int) -> Iterator[tuple[int, int]]:
        """Yield all clusters, cut where a range has as many `vectors` to visit, or one cluster more than those."""
        _, edges = self._by_cluster
        low = 0
        while low < self.count:
            high = max(low + 1, int(np.searchsorted(edges, edges[low] + vectors, side="right")) - 1)
            yield low, min(high, self.count)
            low = high

    def meets(self, first: Rows, second: Rows) -> npt.NDArray[np.bool_]:
        """Tell of vectors `[P]` and vectors `[P]` which of them, pair by pair, come together in some cluster."""
        one = (self.nearest[first] == self.own[second][:, None]).any(axis=1)
        other = (self.nearest[second] == self.own[first][:, None]).any(axis=1)
        met: npt.NDArray[np.bool_] = one | other
        return met

    @cached_property
    def _by_cluster(self) -> tuple[Rows, Rows]:
        """Places in `nearest`, by cluster, its own vectors first; where each cluster begins."""
        places = self.nearest.astype(np.int64) * 2
        places[:, 1:] += 1
        edges = np.searchsorted(np.sort(self.nearest, axis=None), np.arange(self.count + 1))
        return np.argsort(places, axis=None, kind="stable"), edges


def number_of_clusters(size: int, count: int) -> int:
    """Return how many clusters `size` vectors get where `count` are asked for; 0: the square root of `size`."""
    return min(count or round(math.sqrt(size)), size)


def cluster(vectors: Vectors, count: int, neighbours: int, seed: int) -> Clusters:
    """Cluster unit `vectors` `[N, D]` by spherical k-means, on a graphics card where faiss has one.

    Args:
        vectors: different ones, or some clusters stay empty.
        count: of clusters; 0: the square root of N, where centroids and members cost the same.
        neighbours: nearest clusters that are noted of each vector beside its own.
        seed: of the vectors trained on, and of the first centroids.

    Raises:
        UserError: faiss is not installed.
    """
    size, count = len(vectors), number_of_clusters(len(vectors), count)
    if count <= 1:
        return one_cluster(size)
    width = min(1 + neighbours, count)
    search = NearestCentroids(centroids(vectors, count, seed), width)
    nearest = np.empty((size, width), np.int32)
    for at in range(0, size, ASSIGNED_AT_ONCE):
        nearest[at : at + ASSIGNED_AT_ONCE] = search.of(vectors[at : at + ASSIGNED_AT_ONCE])
    return Clusters(nearest, count)


def one_cluster(size: int) -> Clusters:
    """Return all of `size` vectors in one."""
    return Clusters(np.zeros((size, 1), np.int32), 1)


def centroids(vectors: Vectors, count: int, seed: int) -> npt.NDArray[np.float32]:
    """Return the centroids `[count, D]` of unit `vectors` `[N, D]`, by spherical k-means over some of them."""
    faiss, size = load_faiss(), len(vectors)
    some = np.sort(np.random.default_rng(seed).choice(size, min(size, count * TRAINED_ON), replace=False))
    means = faiss.Kmeans(
        vectors.shape[1], count, niter=ITERATIONS, seed=seed, spherical=True, gpu=has_card(),
        min_points_per_centroid=1, max_points_per_centroid=TRAINED_ON,
    )  # fmt: skip
    means.train(np.ascontiguousarray(vectors[some], np.float32))
    found: npt.NDArray[np.float32] = means.centroids
    return found


class NearestCentroids:
    """Which `width` of the centroids `[K, D]` vectors are nearest to; on a graphics card where faiss has one."""

    def __init__(self, centroids: npt.NDArray[np.float32], width: int) -> None:
        faiss = load_faiss()
        self._width, self._index = width, faiss.IndexFlatIP(centroids.shape[1])
        if has_card():
            self._index = faiss.index_cpu_to_all_gpus(self._index)
        self._index.add(centroids)

    def of(self, vectors: npt.NDArray[np.floating]) -> npt.NDArray[np.int32]:
        """Return the numbers of the nearest ones of each of `vectors` `[n, D]`, by closeness: `[n, width]`."""
        found: npt.NDArray[np.int64] = self._index.search(np.ascontiguousarray(vectors, np.float32), self._width)[1]
        return found.astype(np.int32)


def has_card() -> bool:
    """Tell whether faiss works on a graphics card here."""
    return bool(load_faiss().get_num_gpus() > 0)


def load_faiss() -> Any:
    """Return the module `faiss`. Raises UserError where it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise UserError(
            f"near embeddings are found with faiss, which is not here ({error}); pip install 'pairmill[semantic]'"
        ) from None
    return faiss
