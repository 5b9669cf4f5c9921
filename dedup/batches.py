"""Groups of equal hashes cut into batches that have nothing to do with each other.

Who goes for whom is decided among samples that are joined by equal or near hashes, so a batch of whole components of
the groups is decided by itself, anywhere, in any order. Where captions have to agree too, groups are of equal hash and
caption.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dedup.caption_groups import by_caption
from dedup.choose import HashGroups, Indices
from dedup.components import components
from dedup.hamming import Pairs


@dataclass(frozen=True)
class Batch:
    """Whole components: `S` samples by group and within it by rank, in `G` groups of equal hash."""

    samples: Indices  # [S], their numbers in the corpus
    ends: Indices  # [G + 1]
    pairs: Pairs  # [P, 3]: two groups of the batch, bits
    place: Indices  # [S], the rank

    def __str__(self) -> str:
        return f"{len(self.samples)} samples in {len(self.ends) - 1} groups of equal hash"


class Batches:
    """Batches of at most `most` samples; a larger component is one by itself.

    The components come by their lowest hash, so the cut depends on nothing but hashes, captions and `most`. Only groups
    that have something to compare are in it: two samples or more, or a near group. A batch is made when asked for.
    """

    def __init__(
        self,
        groups: HashGroups,
        pairs: Pairs,
        place: Indices,
        captions: npt.NDArray[np.uint64] | None,
        most: int,
    ) -> None:
        """Cut `groups`, which `pairs` `[P, 3]` join.

        Args:
            groups: of equal hash.
            pairs: two of the groups, bits.
            place: `[N]`, the rank of all samples.
            captions: `[N, 2]`, the digests of their captions, where these have to agree.
            most: samples of a batch.
        """
        if captions is not None:
            groups, pairs = by_caption(groups, pairs, captions)
        self._groups, self._pairs, self._place = groups, pairs, place
        sizes = np.diff(groups.ends)
        compared = sizes > 1
        compared[pairs[:, :2].ravel()] = True
        chosen = np.flatnonzero(compared)
        component = components(len(sizes), [(pairs[:, 0], pairs[:, 1])])[chosen]
        by_component = np.argsort(component, kind="stable")
        self._order = chosen[by_component]
        self.samples = int(sizes[self._order].sum())
        self._bounds = _cuts(sizes[self._order], component[by_component], most)
        self._row = np.empty(len(sizes), np.int64)
        self._row[self._order] = np.arange(len(self._order))
        rows = self._row[pairs[:, 0]]
        self._by_row = np.argsort(rows, kind="stable")
        self._pair_bounds = np.searchsorted(rows, self._bounds, sorter=self._by_row)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __iter__(self) -> Iterator[Batch]:
        spans = itertools.pairwise(self._bounds.tolist())
        for (low, high), pairs in zip(spans, itertools.pairwise(self._pair_bounds.tolist()), strict=True):
            yield self._batch(low, high, self._pairs[self._by_row[slice(*pairs)]])

    def _batch(self, low: int, high: int, pairs: Pairs) -> Batch:
        groups = self._order[low:high]
        starts = self._groups.ends[groups]
        sizes = self._groups.ends[groups + 1] - starts
        ends = np.concatenate([[0], np.cumsum(sizes)])
        samples = self._groups.samples[np.repeat(starts - ends[:-1], sizes) + np.arange(ends[-1])]
        mine = np.stack([self._row[pairs[:, 0]] - low, self._row[pairs[:, 1]] - low, pairs[:, 2]], axis=1)
        return Batch(samples, ends, mine, self._place[samples])


def _cuts(sizes: Indices, component: Indices, most: int) -> Indices:
    """Return the rows of the groups `[G]`, sorted by `component`, at which a batch ends or begins."""
    starts = np.flatnonzero(np.diff(component, prepend=-1))
    before = np.concatenate([[0], np.cumsum(sizes)])[np.append(starts, len(sizes))]  # samples up to each component
    cuts = [0]
    while cuts[-1] < len(starts):
        at = cuts[-1]
        cuts.append(max(at + 1, int(np.searchsorted(before, before[at] + most, side="right")) - 1))
    return np.append(starts, len(sizes))[cuts]
