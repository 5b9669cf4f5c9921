"""K-means over unit vectors: which clusters each of them is near to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from infra.errors import UserError

Vectors = npt.NDArray[np.floating]
Rows = npt.NDArray[np.int64]

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

    def visits(self) -> Iterator[tuple[int, Rows, Rows]]:
        """Yield each cluster that is not empty, its vectors, and those of other clusters that are near to it."""
        order, edges = self._by_cluster
        width = self.nearest.shape[1]
        sizes = np.bincount(self.own, minlength=self.count)
        for cluster in np.flatnonzero(sizes).tolist():
            rows = order[edges[cluster] : edges[cluster + 1]] // width
            yield cluster, rows[: sizes[cluster]], rows[sizes[cluster] :]

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
    size = len(vectors)
    count = min(count or round(math.sqrt(size)), size)
    width = min(1 + neighbours, count)
    if count <= 1:
        return Clusters(np.zeros((size, 1), np.int32), 1)
    faiss = load_faiss()
    some = np.sort(np.random.default_rng(seed).choice(size, min(size, count * TRAINED_ON), replace=False))
    means = faiss.Kmeans(
        vectors.shape[1], count, niter=ITERATIONS, seed=seed, spherical=True, gpu=faiss.get_num_gpus() > 0,
        min_points_per_centroid=1, max_points_per_centroid=TRAINED_ON,
    )  # fmt: skip
    means.train(np.ascontiguousarray(vectors[some], np.float32))
    nearest = np.empty((size, width), np.int32)
    for at in range(0, size, ASSIGNED_AT_ONCE):
        part = np.ascontiguousarray(vectors[at : at + ASSIGNED_AT_ONCE], np.float32)
        nearest[at : at + ASSIGNED_AT_ONCE] = means.index.search(part, width)[1]
    return Clusters(nearest, count)


def load_faiss() -> Any:
    """Return the module `faiss`. Raises UserError where it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise UserError(
            f"near embeddings are found with faiss, which is not here ({error}); pip install 'pairmill[semantic]'"
        ) from None
    return faiss
