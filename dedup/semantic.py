"""Pairs of embeddings over a cosine, and which sample goes for which.

After Abbas et al., "SemDeDup: Data-efficient learning at web-scale through semantic deduplication" (2023), section 3:
k-means, then all pairs inside each cluster. There a pair that a border cuts is lost; here a vector is also compared
with the clusters of its next nearest centroids. It is enough that one of the two has the other's cluster among them.
The random part of the gap between two vectors is spread over all dimensions, and little of it lies towards a centroid:
so the order of centroids is nearly the same for both, and few neighbours do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dedup.clusters import Clusters, Rows, Vectors

Cosines = npt.NDArray[np.float32]
_HASHED_AT_ONCE = 65_536
SAMPLED = 1000
"""Vectors that are compared with all others, to tell how many pairs the clusters miss."""


class NearPairs(NamedTuple):
    """Pairs of vectors and their cosines, each `[P]`."""

    first: Rows
    second: Rows
    cosine: Cosines

    @classmethod
    def joined(cls, parts: Iterable[NearPairs]) -> NearPairs:
        """Return the pairs of several parts, in their order."""
        none = cls(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
        first, second, cosine = zip(none, *parts, strict=True)
        return cls(np.concatenate(first), np.concatenate(second), np.concatenate(cosine))


def near_pairs(
    vectors: Vectors, clusters: Clusters, threshold: float, block: int, low: int = 0, high: int | None = None
) -> Iterator[NearPairs]:
    """Yield the pairs of unit `vectors` `[N, D]` whose cosine is `threshold` or more, each once, in parts.

    Compared are vectors of one cluster, and of two where one vector has the other's among its nearest. Equal vectors
    all pair with each other: join different ones (`equal`). Of the clusters from `low` to before `high` come the pairs
    that no cluster below them brings together, so the union over ranges names each once and they may be worked on
    anywhere.

    Memory: a matrix of `block` x `block` cosines, and at worst a pair for each of them in a part.
    """
    own = clusters.own
    for cluster, members, others in clusters.visits(low, high):
        for at in range(0, len(members), block):
            right = members[at : at + block]
            columns = _float32(vectors, right).T
            rows = np.concatenate([members[at:], others])
            for start in range(0, len(rows), block):
                left = rows[start : start + block]
                cosines = (_float32(vectors, left) @ columns).ravel()
                hits = np.flatnonzero(cosines >= threshold)
                row, column = np.divmod(hits, len(right))
                is_new = start + row > column  # within the cluster: below the diagonal
                row, column, hits = row[is_new], column[is_new], hits[is_new]
                first, second = left[row], right[column]
                is_new = ~_is_met_before(clusters, own[first], cluster, second)
                if is_new.any():
                    lower, higher = np.minimum(first, second), np.maximum(first, second)
                    yield NearPairs(lower[is_new], higher[is_new], cosines[hits[is_new]])


def _is_met_before(
    clusters: Clusters, of_first: npt.NDArray[np.int32], cluster: int, second: Rows
) -> npt.NDArray[np.bool_]:
    """Tell which pairs come up in the cluster `of_first` too, when that is the lower of the two."""
    met = of_first < cluster
    asked = np.flatnonzero(met)
    met[asked] = (clusters.nearest[second[asked]] == of_first[asked, None]).any(axis=1)
    return met


def _float32(vectors: Vectors, rows: Rows) -> npt.NDArray[np.float32]:
    found: npt.NDArray[np.float32] = vectors[rows].astype(np.float32, copy=False)
    return found


def all_pairs(vectors: Vectors, clusters: Clusters, threshold: float, block: int) -> NearPairs:
    """Return what `near_pairs` yields, sorted by first and second."""
    first, second, cosine = NearPairs.joined(near_pairs(vectors, clusters, threshold, block))
    order = np.lexsort((second, first))
    return NearPairs(first[order], second[order], cosine[order])


def looked_at(
    vectors: Vectors, clusters: Clusters, threshold: float, block: int, seed: int, sampled: int = SAMPLED
) -> tuple[int, int]:
    """Return how many pairs over `threshold` a sample of the vectors has with all others, and how many `clusters` meet.

    Their ratio is about the share of all pairs that `near_pairs` finds. It costs `sampled` times N cosines.
    """
    some = np.sort(np.random.default_rng(seed).choice(len(vectors), min(len(vectors), sampled), replace=False))
    columns, every, met = _float32(vectors, some).T, 0, 0
    for at in range(0, len(vectors), block):
        rows = np.arange(at, min(len(vectors), at + block))
        row, column = np.divmod(np.flatnonzero((_float32(vectors, rows) @ columns).ravel() >= threshold), len(some))
        first, second = rows[row], some[column]
        first, second = first[first != second], second[first != second]
        every += len(first)
        met += int(clusters.meets(first, second).sum())
    return every, met


def equal(vectors: Vectors, place: Rows) -> Rows:
    """Return for each of `N` vectors `[N, D]` the row that stands for all equal to it, `[N]`: that of lowest `place`.

    Rows are told apart by a 64-bit hash and then compared, so one that only hashes like another stands for itself.
    """
    hashes = _hashes(vectors)
    by_place = np.argsort(place, kind="stable")
    _, first, group = np.unique(hashes[by_place], return_index=True, return_inverse=True)
    leader = np.empty(len(vectors), np.int64)
    leader[by_place] = by_place[first[group]]
    for at in range(0, len(vectors), _HASHED_AT_ONCE):
        rows = np.arange(at, min(len(vectors), at + _HASHED_AT_ONCE))
        rows = rows[leader[rows] != rows]
        unlike = rows[(vectors[rows] != vectors[leader[rows]]).any(axis=1)]
        leader[unlike] = unlike
    return leader


def _hashes(vectors: Vectors) -> npt.NDArray[np.uint64]:
    drawn = np.random.default_rng(0).integers(0, 2**64, (vectors.shape[1],), dtype=np.uint64)
    factors: npt.NDArray[np.uint64] = drawn | np.uint64(1)
    words = np.dtype(f"u{vectors.dtype.itemsize}")
    hashes = np.empty(len(vectors), np.uint64)
    for at in range(0, len(vectors), _HASHED_AT_ONCE):
        part = np.ascontiguousarray(vectors[at : at + _HASHED_AT_ONCE]).view(words).astype(np.uint64)
        mixed = (part + np.uint64(1)) * factors
        mixed ^= mixed >> np.uint64(29)
        hashes[at : at + _HASHED_AT_ONCE] = (mixed * factors[::-1]).sum(axis=1, dtype=np.uint64)
    return hashes
