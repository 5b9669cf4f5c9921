"""Which sample of several stays, and for which of them each other one goes.

A sample goes only for one that stays and that it was compared with: chains (A like B, B like C, A unlike C)
do not take C away for A. The components of all links are kept beside, since a huge one is the sign of a bad
threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dedup.components import Components
from dedup.config import DedupConfig
from dedup.hamming import Hashes
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
    """Samples by equal hash: group `g` has hash `hashes[g]` and `samples[ends[g] : ends[g + 1]]`, best first."""

    hashes: Hashes  # [G, 4]
    samples: Indices  # [S], by group, then by rank
    ends: Indices  # [G + 1]


def by_hash(hashes: Hashes, samples: Indices, place: Indices) -> HashGroups:
    """Group `samples` by their rows of `hashes` `[N, 4]`; `place` `[N]` is their rank."""
    samples = samples[np.argsort(place[samples], kind="stable")]
    rows = np.ascontiguousarray(hashes[samples])
    _, first, group = np.unique(rows.view("S32").ravel(), return_index=True, return_inverse=True)
    sizes = np.bincount(group, minlength=len(first))
    return HashGroups(rows[first], samples[np.argsort(group, kind="stable")], np.concatenate([[0], np.cumsum(sizes)]))


class Settled(NamedTuple):
    """For `S` samples that are linked to no others: what `Removals` says of them, but for copies of their bodies."""

    samples: Indices  # [S]
    kept: Indices  # [S], the sample each goes for, -1 if it stays
    distance: npt.NDArray[np.int32]  # [S]
    component: Indices  # [S], a sample of its component


def choose(body_leader: Indices, parts: Iterable[Settled]) -> Removals:
    """Put together who goes for whom.

    Args:
        body_leader: `[N]`, the sample that stands for all with the same body.
        parts: what is settled among those, in any order; who is in none of them stays.
    """
    size = len(body_leader)
    kept, distance, joined = np.full(size, NOBODY), np.zeros(size, np.int32), Components(size)
    for part in parts:
        kept[part.samples], distance[part.samples] = part.kept, part.distance
        joined.join(part.samples, part.component)
    copies = np.flatnonzero(body_leader != np.arange(size))
    of = body_leader[copies]
    joined.join(copies, of)
    is_exact = np.zeros(size, bool)
    is_exact[copies] = kept[of] == NOBODY
    distance[copies] = distance[of]
    kept[copies] = np.where(is_exact[copies], of, kept[of])
    cosine, is_capped = np.full(size, np.nan, np.float32), np.zeros(size, bool)
    return Removals(kept, is_exact, distance, joined.labels(), cosine, is_capped)


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
