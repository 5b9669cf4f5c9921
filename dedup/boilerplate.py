"""A cap on captions that say nearly the same: beyond the best so many samples of one, the others go.

A sample that others have gone for already, by their look, stays where one of them has a caption of another kind: else
that picture would be gone under every caption.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from dedup.choose import NOBODY, Indices, Removals
from dedup.config import TextConfig
from dedup.text import Digests, alike, over_cap
from infra.logs import log

DigestsOf = Callable[[Indices], Digests]
"""Returns the digests of the captions of samples `[n]`, `[n, 128]`."""


def remove_boilerplate(
    before: Removals,
    caption_digest: npt.NDArray[np.uint64],
    place: Indices,
    digests_of: DigestsOf,
    config: TextConfig,
    left_out: npt.NDArray[np.bool_] | None = None,
) -> Removals:
    """Take out of those that stay in `before` what is beyond `config.cap` on captions that say nearly the same.

    Args:
        before: of all `N` samples.
        caption_digest: `[N, 2]`, equal where captions are.
        place: `[N]`, the rank.
        digests_of: asked once for each different caption.
        config: cap and similarity.
        left_out: `[N]`, samples that go for another reason and count for nothing here.
    """
    stays = np.flatnonzero((before.kept == NOBODY) & (True if left_out is None else ~left_out))
    group = _groups(caption_digest, digests_of, config.similarity)
    kept = before.kept.copy()
    kept[stays] = _of(stays, over_cap(group[stays], place[stays], config.cap))
    gone_before = np.flatnonzero(before.kept != NOBODY)
    of = before.kept[gone_before]
    kept[of[group[of] != group[gone_before]]] = NOBODY
    follows = gone_before[kept[of] != NOBODY]
    kept[follows] = kept[before.kept[follows]]
    is_capped = (kept != NOBODY) & (before.kept == NOBODY)
    is_capped[follows] = True
    log.info("dedup: %d captions of several kinds, %d samples beyond the cap", len(np.unique(group)), is_capped.sum())
    is_exact, cosine = before.is_exact & ~is_capped, np.where(is_capped, np.float32(np.nan), before.cosine)
    return replace(before, kept=kept, is_exact=is_exact, cosine=cosine, is_capped=is_capped)


def _groups(caption_digest: npt.NDArray[np.uint64], digests_of: DigestsOf, similarity: float) -> Indices:
    """Return for each of `N` samples the number of its kind of caption, `[N]`."""
    rows = np.ascontiguousarray(caption_digest).view("V16").ravel()
    _, first, caption, count = np.unique(rows, return_index=True, return_inverse=True, return_counts=True)
    by_count = np.lexsort((first, -count))  # the commonest caption leads its kind
    follows = alike(digests_of(first[by_count]), similarity)
    kind = np.empty(len(first), np.int64)
    kind[by_count] = follows
    return kind[caption]


def _of(samples: Indices, among: Indices) -> Indices:
    """Return places `among` some `samples`, -1 for none, as numbers of samples."""
    return np.where(among == NOBODY, NOBODY, samples[among]) if len(samples) else among
