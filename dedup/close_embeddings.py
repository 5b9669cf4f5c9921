"""Pairs of embeddings over a cosine: by threads on one machine, over the nodes of a cluster.

On a cluster the vectors stay with the driver. It cuts them into blocks, whose nearest centroids the workers find, and
then hands out each cluster with the vectors near it: one is handed out once for each cluster that is near it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import ray

from dedup.best_links import BestLinks, Found
from dedup.clusters import (
    ASSIGNED_AT_ONCE,
    Clusters,
    NearestCentroids,
    Rows,
    Vectors,
    centroids,
    cluster,
    has_card,
    number_of_clusters,
)
from dedup.config import SemanticConfig
from dedup.semantic import near_pairs
from dedup.spread import has_cluster, on_ray
from infra.cluster import ClusterConfig, session
from infra.logs import progress

FEW_VECTORS = 100_000
"""Up to so many, this process does the work itself: sooner done than a worker is started."""
_VISITED_AT_ONCE = 65_536
"""Vectors that a task is handed, or those of one cluster: 67 MB of 512 numbers in float16. The driver holds a task for
each worker, and no more."""


def clusters_of(vectors: Vectors, config: SemanticConfig, on: ClusterConfig) -> Clusters:
    """Return the clusters of unit `vectors` `[N, D]`, all different, as `clusters.cluster` does.

    Raises:
        UserError: faiss is not installed.
    """
    count = number_of_clusters(len(vectors), config.clusters)
    if _is_few(vectors, on) or count <= 1 or has_card():
        return cluster(vectors, config.clusters, config.neighbours, config.seed)
    middles = centroids(vectors, count, config.seed)
    width = min(1 + config.neighbours, count)
    nearest = np.empty((len(vectors), width), np.int32)

    def blocks() -> Iterator[_Block]:
        for at in range(0, len(vectors), ASSIGNED_AT_ONCE):
            yield _Block(at, [ray.put(vectors[at : at + ASSIGNED_AT_ONCE])])

    with session(on), progress("dedup: clusters", len(vectors), "embeddings") as meter:
        for block, found in on_ray(_Assigner, ([ray.put(middles)], width), blocks(), on):
            nearest[block.at : block.at + len(found)] = found
            meter.advance(len(found))
    return Clusters(nearest, count)


def close_links(
    vectors: Vectors, place: Rows, clusters: Clusters, config: SemanticConfig, on: ClusterConfig
) -> BestLinks:
    """Return what the pairs of unit `vectors` `[N, D]` over the threshold come to; `place` `[N]` is their rank."""
    links = BestLinks(place)
    if _is_few(vectors, on):
        for pairs in near_pairs(vectors, clusters, config.threshold, config.block):
            links.add(pairs)
        return links

    def ranges() -> Iterator[_Range]:
        for low, high in clusters.ranges(_VISITED_AT_ONCE):
            rows, part = clusters.part(low, high)
            yield _Range([ray.put((rows, vectors[rows], place[rows], part))], low, high)

    with session(on), progress("dedup: near embeddings", clusters.count, "clusters") as meter:
        for task, found in on_ray(_Comparer, (config.threshold, config.block), ranges(), on, ahead=0):
            links.merge(found)
            meter.advance(task.high - task.low, pairs=found.pairs)
    return links


def _is_few(vectors: Vectors, on: ClusterConfig) -> bool:
    return not has_cluster(on) or len(vectors) <= FEW_VECTORS


class _Block(NamedTuple):
    at: int
    vectors: list[Any]  # a reference in a list stays one

    def __str__(self) -> str:
        return f"embeddings {self.at} and on"


class _Range(NamedTuple):
    visited: list[Any]
    low: int
    high: int

    def __str__(self) -> str:
        return f"clusters {self.low} to {self.high - 1}"


class _Assigner:
    """Finds the nearest centroids of one block at a time; a Ray actor holds one."""

    def __init__(self, middles: list[Any], width: int) -> None:
        self._search = NearestCentroids(ray.get(middles[0]), width)

    def run(self, block: _Block) -> Any:
        """Return the numbers of the nearest centroids, `[n, width]`."""
        return self._search.of(ray.get(block.vectors[0]))


class _Comparer:
    """Compares the vectors of one range of clusters at a time; a Ray actor holds one."""

    def __init__(self, threshold: float, block: int) -> None:
        self._threshold, self._block = threshold, block

    def run(self, task: _Range) -> Found:
        """Return what the pairs of a range come to."""
        rows, vectors, place, clusters = ray.get(task.visited[0])
        links = BestLinks(place)
        for pairs in near_pairs(vectors, clusters, self._threshold, self._block, task.low, task.high):
            links.add(pairs)
        return links.found(rows)
