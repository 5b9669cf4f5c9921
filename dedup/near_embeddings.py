"""Which samples go for another one by their embeddings, of those that body and look have left.

As everywhere here a sample goes only for one that stays and that it was compared with (`choose.settle`), where
SemDeDup's published code drops it for any before it, one that goes itself included.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from dedup.choose import NOBODY, Removals, settle
from dedup.close_embeddings import close_links, clusters_of
from dedup.clusters import Clusters, Rows, Vectors
from dedup.components import Components
from dedup.config import SemanticConfig
from dedup.embeddings import Chosen, Embeddings
from dedup.semantic import equal, looked_at
from infra.cluster import ClusterConfig
from infra.logs import log

WANTED_SHARE = 0.99
"""Of the pairs; where the clusters meet fewer, those that stay are looked at again."""


def remove_near(
    before: Removals, embeddings: Embeddings, place: Rows, config: SemanticConfig, on: ClusterConfig
) -> Removals:
    """Take out of those that stay in `before` the ones with a better sample over the threshold that stays.

    Who has gone for one of them already goes on to where it goes. So one goes only if all of them, but for copies of
    its own body, are near to where it goes too. Where a sample tells that the clusters miss pairs, those that stay are
    clustered and compared anew, as long as some of them go: a dense spot is cut by many borders, and less so each time.

    Args:
        before: of all `N` samples.
        embeddings: of the same.
        place: `[N]`, the rank.
        config: threshold and clusters.
        on: where the work is done.

    Raises:
        UserError: faiss is not installed.
    """
    found, missed = _round(before, embeddings, place, config, on)
    while missed:
        again, missed = _round(found, embeddings, place, config, on)
        if np.array_equal(again.kept, found.kept):
            break
        found = again
    if missed:
        log.warning("dedup: %s; fewer with more --semantic.neighbours than %d", missed, config.neighbours)
    return found


def _round(
    before: Removals, embeddings: Embeddings, place: Rows, config: SemanticConfig, on: ClusterConfig
) -> tuple[Removals, str]:
    """Return who goes after one clustering, and in words how many pairs that missed; empty where few."""
    candidates = np.flatnonzero((before.kept == NOBODY) & embeddings.has)
    leader = candidates[equal(Chosen(embeddings.vectors, candidates), place[candidates])]
    is_leader = leader == candidates
    leaders, followers, of = candidates[is_leader], candidates[~is_leader], leader[~is_leader]
    vectors = Chosen(embeddings.vectors, leaders)
    clusters = clusters_of(vectors, config, on)
    links = close_links(vectors, place[leaders], clusters, config, on)
    log.info("dedup: %d pairs of embeddings over %g, of %d", links.count, config.threshold, len(leaders))
    missed = _missed(vectors, clusters, config)
    better, worse, cosine = links.best()
    better, worse = leaders[better], leaders[worse]
    dependants = _Dependants(before, embeddings, config.threshold)
    allowed = dependants.may_follow(worse, better)
    kept, cosines = before.kept.copy(), before.cosine.copy()
    by = settle(better[allowed], worse[allowed], -cosine[allowed], place, kept)
    gone = np.flatnonzero(by != NOBODY)
    cosines[gone] = embeddings.cosines(gone, kept[gone])  # to the last bit the same, whatever the blocks were
    follows = dependants.may_follow(followers, of) & (kept[of] == NOBODY)
    onward = kept[of] != NOBODY
    onward[onward] = dependants.may_follow(followers[onward], kept[of[onward]])
    kept[followers[follows]], cosines[followers[follows]] = of[follows], 1.0
    kept[followers[onward]], cosines[followers[onward]] = kept[of[onward]], cosines[of[onward]]
    joined = Components(len(place))
    joined.join(np.arange(len(place)), before.component)
    joined.join(*(leaders[side] for side in links.components.forest()))
    joined.join(of, followers)
    now = replace(before, kept=kept, cosine=cosines, component=joined.labels())
    return _with_dependants(before, embeddings, now), missed


def _missed(vectors: Vectors, clusters: Clusters, config: SemanticConfig) -> str:
    every, met = looked_at(vectors, clusters, config.threshold, config.block, config.seed)
    if met >= WANTED_SHARE * every:
        return ""
    share = 1 - met / every
    return f"clusters miss about {share:.1%} of the pairs of embeddings ({every - met} of {every} of a sample's)"


def _with_dependants(before: Removals, embeddings: Embeddings, now: Removals) -> Removals:
    """Send those that had gone for a sample that goes now on to where that one goes."""
    earlier = np.flatnonzero(before.kept != NOBODY)
    earlier = earlier[now.kept[before.kept[earlier]] != NOBODY]
    of = before.kept[earlier]
    cosine = embeddings.cosines(earlier, now.kept[of])
    now.cosine[earlier] = np.where(before.is_exact[earlier], now.cosine[of], cosine)
    now.kept[earlier] = now.kept[of]
    is_exact = before.is_exact.copy()
    is_exact[earlier] = False
    return replace(now, is_exact=is_exact)


class _Dependants:
    """Samples that have gone for another by their look."""

    def __init__(self, before: Removals, embeddings: Embeddings, threshold: float) -> None:
        gone = np.flatnonzero((before.kept != NOBODY) & ~before.is_exact)
        self.samples = gone[np.argsort(before.kept[gone], kind="stable")]
        counts = np.bincount(before.kept[gone], minlength=len(before.kept))
        self.ends = np.concatenate([[0], np.cumsum(counts)])
        self.embeddings, self.threshold = embeddings, threshold

    def may_follow(self, worse: Rows, better: Rows) -> npt.NDArray[np.bool_]:
        """Tell of samples `worse` `[L]` which may go for `better` `[L]`: those all of whose dependants are near it."""
        count = self.ends[worse + 1] - self.ends[worse]
        link = np.repeat(np.arange(len(worse)), count)
        step = np.arange(len(link)) - np.repeat(np.cumsum(count) - count, count)
        sample = self.samples[np.repeat(self.ends[worse], count) + step]
        is_near = self.embeddings.cosines(sample, better[link]) >= self.threshold
        may = np.ones(len(worse), bool)
        may[link[~is_near]] = False
        return may
