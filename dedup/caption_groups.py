"""Groups of equal hashes cut further, by caption, where only samples of one caption may go for each other.

A picture may have any number of captions. Two groups of near hashes are joined on their captions, so that the work
grows with the captions of the smaller one, not with the product of both.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from dedup.choose import HashGroups, Indices
from dedup.hamming import Pairs

_AT_ONCE = 1 << 20
"""Captions that are looked for in a near group at a time."""


def by_caption(groups: HashGroups, pairs: Pairs, captions: npt.NDArray[np.uint64]) -> tuple[HashGroups, Pairs]:
    """Return groups of equal hash and caption, and the pairs of them that agree in caption.

    Args:
        groups: of equal hash.
        pairs: `[P, 3]`, two of those, bits.
        captions: `[N, 2]`, the digests of all samples' captions.
    """
    sizes = np.diff(groups.ends)
    group, caption = np.repeat(np.arange(len(sizes)), sizes), _numbered(groups, pairs, captions)
    order = np.lexsort((caption, group))  # stable: the best first, as before
    group, caption = group[order], caption[order]
    is_first = (np.diff(group, prepend=-1) != 0) | (np.diff(caption, prepend=-1) != 0)
    starts = np.flatnonzero(is_first)
    group, caption = group[starts], caption[starts]
    cut = HashGroups(groups.hashes[group], groups.samples[order], np.append(starts, len(order)))
    return cut, np.concatenate([np.empty((0, 3), np.int64), *_joined(group, caption, len(sizes), pairs)])


def _numbered(groups: HashGroups, pairs: Pairs, captions: npt.NDArray[np.uint64]) -> Indices:
    """Return a number for the caption of each of the groups' samples, `[S]`; 0 where nothing is compared with it."""
    sizes = np.diff(groups.ends)
    is_compared = sizes > 1
    is_compared[pairs[:, :2].ravel()] = True
    some = np.repeat(is_compared, sizes)
    rows = np.ascontiguousarray(captions[groups.samples[some]]).view("V16").ravel()
    caption = np.zeros(len(groups.samples), np.int64)
    caption[some] = np.unique(rows, return_inverse=True)[1]
    return caption


def _joined(group: Indices, caption: Indices, count: int, pairs: Pairs) -> Iterator[Pairs]:
    """Yield the pairs of equal `caption` `[C]`, sorted by `group` `[C]` and then by caption, of `count` groups.

    Each caption of the group that has fewer is looked for in the other.
    """
    kinds = int(caption.max(initial=0)) + 1
    known = group * kinds + caption
    ends = np.searchsorted(group, np.arange(count + 1))
    width = np.diff(ends)
    swap = width[pairs[:, 0]] > width[pairs[:, 1]]
    few, many = np.where(swap, pairs[:, 1], pairs[:, 0]), np.where(swap, pairs[:, 0], pairs[:, 1])
    upto = np.concatenate([[0], np.cumsum(width[few])])
    for at in range(0, int(upto[-1]), _AT_ONCE):
        step = np.arange(at, min(at + _AT_ONCE, upto[-1]))
        pair = np.searchsorted(upto, step, side="right") - 1
        one = ends[few[pair]] + step - upto[pair]
        wanted = many[pair] * kinds + caption[one]
        other = np.searchsorted(known, wanted).clip(max=len(known) - 1)
        found = known[other] == wanted
        one, other, bits = one[found], other[found], pairs[pair[found], 2]
        yield np.stack([np.minimum(one, other), np.maximum(one, other), bits], axis=1)
