"""Pairs of PDQ hashes that are near each other: by threads on one machine, over the nodes of a cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import ray

from dedup.hamming import Chunk, Hashes, Pairs, all_pairs, chunks_for, pairs_of_range, sort_by, sorted_pairs
from dedup.spread import has_cluster, on_ray
from infra.cluster import ClusterConfig, session
from infra.logs import progress

FEW_HASHES = 100_000
"""Up to so many, this process does the work itself: sooner done than a worker is started."""
_RANGES_PER_CHUNK = 256
"""Tasks that a chunk is cut into on a cluster: many a core, since crowded buckets take longer."""


def near_hashes(hashes: Hashes, distance: int, cluster: ClusterConfig) -> Pairs:
    """Return every pair of `hashes` `[N, 4]`, all different, within `distance` bits, as `all_pairs` does."""
    if has_cluster(cluster) and len(hashes) > FEW_HASHES:
        return _on_cluster(hashes, distance, cluster)
    return all_pairs(hashes, distance, threads=cluster.cpus or os.cpu_count() or 1)


class _Range(NamedTuple):
    by_chunk: list[Any]  # a reference in a list stays one: all workers of a node read one copy
    place: int
    low: int
    high: int


class _Ranges:
    """Joins one range of values at a time; a Ray actor holds one."""

    def __init__(self, chunks: list[Chunk], distance: int) -> None:
        self.chunks, self.distance = chunks, distance

    def run(self, task: _Range) -> Pairs:
        """Return the pairs of a range."""
        by_chunk = ray.get(task.by_chunk[0])
        return pairs_of_range(by_chunk, self.chunks, task.place, self.distance, task.low, task.high)


def _on_cluster(hashes: Hashes, distance: int, cluster: ClusterConfig) -> Pairs:
    chunks = chunks_for(len(hashes), distance)

    def tasks() -> Iterator[_Range]:
        for place, chunk in enumerate(chunks):
            by_chunk = sort_by(hashes, chunk)
            reference = [ray.put(by_chunk)]
            for low, high in by_chunk.ranges(_RANGES_PER_CHUNK):
                yield _Range(reference, place, low, high)

    with session(cluster), progress("dedup: near hashes", len(chunks) * _RANGES_PER_CHUNK, "ranges") as meter:
        found = [np.empty((0, 3), np.int64)]
        for _, pairs in on_ray(_Ranges, (chunks, distance), tasks(), cluster):
            found.append(pairs)
            meter.advance(1)
    return sorted_pairs(found)
