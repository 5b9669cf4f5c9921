"""Who goes for whom among the samples of one batch, by links of equal and of near hashes where looks agree.

Samples are named by their places in the batch: those of a group of equal hash lie together, the best first.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dedup.batches import Batch
from dedup.choose import NOBODY, Indices, SameLook, Settled, settle
from dedup.components import components
from dedup.hamming import Pairs

_AT_ONCE = 8192
"""Comparisons that are laid out, and members of a group that are held against its leaders, at a time."""
MOST_LEADERS = 64
"""Looks that pictures of one hash are told apart by. A hash that more of them share tells nothing: those beyond stay,
and join nothing, or comparisons would grow with the square of them."""


def always(first: Indices, second: Indices) -> npt.NDArray[np.bool_]:
    """Take all for the same: no second look."""
    return np.ones(len(first), bool)


def settled(batch: Batch, look: SameLook = always) -> Settled:
    """Decide of each sample of a batch whether it goes, and for whom.

    Of equal hashes the best sample of each look leads. Leaders of near hashes and the same look settle among
    themselves; who follows a leader that goes is compared with the one that stays.

    Args:
        batch: whole components of groups.
        look: the second look, by places in the batch.
    """
    everyone = np.arange(len(batch.samples))
    leader = link_equal_hashes(batch.ends, look)
    near = link_near_hashes(batch, leader, look)
    kept, distance = np.full(len(everyone), NOBODY), np.zeros(len(everyone), np.int32)
    by = settle(near[:, 0], near[:, 1], near[:, 2], batch.place, kept)
    gone = np.flatnonzero(by != NOBODY)
    distance[gone] = near[by[gone], 2]
    follower = np.flatnonzero(leader != everyone)
    of = leader[follower]
    goes_on = kept[of] != NOBODY
    kept[follower[~goes_on]] = of[~goes_on]
    follower, of = follower[goes_on], of[goes_on]
    alike = look(kept[of], follower)
    kept[follower[alike]], distance[follower[alike]] = kept[of[alike]], distance[of[alike]]
    component = components(len(everyone), [(everyone, leader), (near[:, 0], near[:, 1])])
    for_whom = np.where(kept == NOBODY, NOBODY, batch.samples[kept])
    return Settled(batch.samples, for_whom, distance, batch.samples[component])


def link_equal_hashes(ends: Indices, same: SameLook) -> Indices:
    """Return for each of `S` samples the first of its group `[ends[g], ends[g + 1])` that leads and looks the same.

    Itself, where it leads, and where it is like none of the `MOST_LEADERS` that lead already.
    """
    leader = np.arange(ends[-1])
    for group in np.flatnonzero(np.diff(ends) > 1).tolist():
        leaders: list[int] = []
        for low in range(int(ends[group]), int(ends[group + 1]), _AT_ONCE):
            left = np.arange(low, min(low + _AT_ONCE, ends[group + 1]))
            for one in leaders:
                left = _led(one, left, leader, same)
            while len(left) and len(leaders) < MOST_LEADERS:
                leaders.append(int(left[0]))
                left = _led(leaders[-1], left[1:], leader, same)
    return leader


def _led(one: int, left: Indices, leader: Indices, same: SameLook) -> Indices:
    """Enter `one` as the leader of those in `left` that look the same; return the others."""
    if not len(left):
        return left
    alike = same(np.full(len(left), one), left)
    leader[left[alike]] = one
    return left[~alike]


def link_near_hashes(batch: Batch, leader: Indices, same: SameLook) -> Pairs:
    """Return links `[L, 3]` (two leaders, distance) where looks agree, for the batch's pairs of groups.

    The first `MOST_LEADERS` leaders of a group are compared.
    """
    leads = np.flatnonzero(leader == np.arange(len(leader)))
    before = np.searchsorted(leads, batch.ends)
    nth = np.arange(len(leads)) - np.repeat(before[:-1], np.diff(before))
    leads = leads[nth < MOST_LEADERS]
    ends = np.searchsorted(leads, batch.ends)
    a, b, bits = batch.pairs.T
    width = (ends[b + 1] - ends[b]).astype(np.int64)
    upto = np.concatenate([[0], np.cumsum((ends[a + 1] - ends[a]) * width)])
    links = [np.empty((0, 3), np.int64)]
    for at in range(0, int(upto[-1]), _AT_ONCE):
        step = np.arange(at, min(at + _AT_ONCE, upto[-1]))
        pair = np.searchsorted(upto, step, side="right") - 1
        row, column = np.divmod(step - upto[pair], width[pair])
        first, second = leads[ends[a[pair]] + row], leads[ends[b[pair]] + column]
        links.append(np.stack([first, second, bits[pair]], axis=1)[same(first, second)])
    return np.concatenate(links)
