"""Which sample of several stays, and for which of them each other one goes.

A sample goes only for one that stays and that it was compared with: chains (A like B, B like C, A unlike C)
do not take C away for A. The components of all links are kept beside, since a huge one is the sign of a bad
threshold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dedup.components import components
from dedup.config import DedupConfig
from dedup.hamming import Hashes, Pairs
from dedup.signature import Signatures

Indices = npt.NDArray[np.int64]
SameLook = Callable[[Indices, Indices], npt.NDArray[np.bool_]]
"""Tells of samples `[P]` and samples `[P]` which of them, pair by pair, look the same."""

NOBODY = -1
"""In the place of the sample that one goes for: it stays."""


@dataclass(frozen=True)
class Removals:
    """For each of `N` samples: whom it goes for (-1 if it stays), how far that is, and its component."""

    kept: Indices  # [N]
    is_exact: npt.NDArray[np.bool_]  # [N]
    distance: npt.NDArray[np.int32]  # [N], in bits
    component: Indices  # [N], the lowest sample of it
    cosine: npt.NDArray[np.float32]  # [N], of the embeddings; NaN but for those that go by them
    is_capped: npt.NDArray[np.bool_]  # [N], goes since too many have a caption of its kind


def rank(signatures: Signatures, config: DedupConfig) -> Indices:
    """Return each sample's place, `[N]`, 0 for the one that is kept above all others."""
    by_key = np.arange(len(signatures))
    resolution, caption = -signatures.pixels, -signatures.caption_characters.astype(np.int64)
    orders = {
        "resolution": (by_key, caption, resolution),
        "caption": (by_key, resolution, caption),
        "first": (by_key,),
        "source": (by_key, caption, resolution, _preference(signatures.source, config.sources)),
    }
    place = np.empty(len(signatures), np.int64)
    place[np.lexsort(orders[config.keep])] = by_key
    return place


def _preference(source: npt.NDArray[np.str_], sources: tuple[str, ...]) -> Indices:
    place = np.full(len(source), len(sources))
    for number, name in enumerate(sources):
        place[source == name] = number
    return place


@dataclass(frozen=True)
class HashGroups:
    """Samples by equal hash: group `g` has hash `hashes[g]` and the samples `members(g)`, best first."""

    hashes: Hashes  # [G, 4]
    samples: Indices  # [S], by group, then by rank
    ends: Indices  # [G + 1]

    def members(self, group: int) -> Indices:
        """Return the samples of one group, best first."""
        return self.samples[self.ends[group] : self.ends[group + 1]]

    def near(self, pairs: Pairs) -> Indices:
        """Return the samples that share a hash with another or are in one of the group `pairs` `[P, 3]`."""
        sizes = np.diff(self.ends)
        chosen = sizes > 1
        chosen[pairs[:, :2].ravel()] = True
        return self.samples[np.repeat(chosen, sizes)]


def by_hash(hashes: Hashes, samples: Indices, place: Indices) -> HashGroups:
    """Group `samples` by their rows of `hashes` `[N, 4]`; `place` `[N]` is their rank."""
    samples = samples[np.argsort(place[samples], kind="stable")]
    rows = np.ascontiguousarray(hashes[samples])
    _, first, group = np.unique(rows.view("S32").ravel(), return_index=True, return_inverse=True)
    sizes = np.bincount(group, minlength=len(first))
    return HashGroups(rows[first], samples[np.argsort(group, kind="stable")], np.concatenate([[0], np.cumsum(sizes)]))


def link_equal_hashes(groups: HashGroups, same: SameLook) -> tuple[HashGroups, Pairs]:
    """Split each group by look.

    Returns:
        The groups with only their leaders (the best sample of each look), and links `[L, 2]` of leader and
        follower.
    """
    leaders: list[Indices] = []
    links: list[tuple[int, int]] = []
    sizes = np.ones(len(groups.hashes), np.int64)
    for group in range(len(groups.hashes)):
        members = groups.members(group)
        if len(members) > 1:
            found = [int(members[0])]
            for sample in members[1:].tolist():
                alike = same(np.asarray(found), np.full(len(found), sample))
                if alike.any():
                    links.append((found[int(alike.argmax())], sample))
                else:
                    found.append(sample)
            members = np.asarray(found)
        leaders.append(members)
        sizes[group] = len(members)
    samples = np.concatenate(leaders) if leaders else np.empty(0, np.int64)
    ends = np.concatenate([[0], np.cumsum(sizes)])
    return HashGroups(groups.hashes, samples, ends), np.asarray(links, np.int64).reshape(-1, 2)


def link_near_hashes(leaders: HashGroups, pairs: Pairs, same: SameLook, block: int) -> Pairs:
    """Return links `[L, 3]` (two leaders, distance) for group `pairs` `[P, 3]` where looks agree."""
    sizes = np.diff(leaders.ends)
    links = [np.empty((0, 3), np.int64)]
    for at in range(0, len(pairs), block):
        a, b, bits = pairs[at : at + block].T
        count = sizes[a] * sizes[b]
        step = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        width = np.repeat(sizes[b], count)
        first = leaders.samples[np.repeat(leaders.ends[a], count) + step // width]
        second = leaders.samples[np.repeat(leaders.ends[b], count) + step % width]
        links.append(np.stack([first, second, np.repeat(bits, count)], axis=1)[same(first, second)])
    return np.concatenate(links)


def choose(body_leader: Indices, followers: Pairs, near: Pairs, place: Indices, same: SameLook) -> Removals:
    """Decide who goes for whom.

    Args:
        body_leader: `[N]`, the sample that stands for all with the same body.
        followers: `[F, 2]`, leader and follower of equal hash and look.
        near: `[L, 3]`, two leaders of near hash and same look, and their distance.
        place: `[N]`, the rank.
        same: looks at a follower again whose leader goes for another.
    """
    size = len(place)
    kept, distance = np.full(size, NOBODY), np.zeros(size, np.int32)
    by = settle(near[:, 0], near[:, 1], near[:, 2], place, kept)
    gone = np.flatnonzero(by != NOBODY)
    distance[gone] = near[by[gone], 2]
    for leader, follower in followers.tolist():
        stays = int(kept[leader])
        if stays == NOBODY:
            kept[follower] = leader
        elif same(np.asarray([stays]), np.asarray([follower]))[0]:
            kept[follower], distance[follower] = stays, distance[leader]
    copies = np.flatnonzero(body_leader != np.arange(size))
    of = body_leader[copies]
    is_exact = np.zeros(size, bool)
    is_exact[copies] = kept[of] == NOBODY
    distance[copies] = distance[of]
    kept[copies] = np.where(is_exact[copies], of, kept[of])
    first = np.concatenate([copies, followers[:, 0], near[:, 0]])
    second = np.concatenate([of, followers[:, 1], near[:, 1]])
    joined = components(size, [(first, second)])
    cosine, is_capped = np.full(size, np.nan, np.float32), np.zeros(size, bool)
    return Removals(kept, is_exact, distance, joined, cosine, is_capped)


def settle(first: Indices, second: Indices, gap: npt.NDArray[Any], place: Indices, kept: Indices) -> Indices:
    """Best first: a sample linked to a better one that stays goes for the closest of those, others stay.

    Args:
        first, second: `[L]`, samples that are linked.
        gap: `[L]`, how far apart they are.
        place: `[N]`, the rank.
        kept: `[N]`, whom each goes for; filled in for those that go.

    Returns:
        `[N]`, the link by which each of them went, -1 for the others.
    """
    swap = place[first] > place[second]
    better, worse = np.where(swap, second, first), np.where(swap, first, second)
    by = np.full(len(place), NOBODY, np.int64)
    order = np.lexsort((place[better], gap, place[worse]))
    for link in order.tolist():
        sample, other = int(worse[link]), int(better[link])
        if kept[sample] == NOBODY and kept[other] == NOBODY:
            kept[sample], by[sample] = other, link
    return by
