"""Samples whose bodies are equal to the byte."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dedup.signature import Signatures


def same_body(signatures: Signatures, rank: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return for each of `N` samples the one that stands for all with its `sha256`: that of lowest `rank`.

    A sample without a digest stands for itself.
    """
    leader = np.arange(len(signatures))
    digested = np.flatnonzero(signatures.has_sha256)
    if not len(digested):
        return leader
    _, group = np.unique(signatures.sha256[digested].view("S32"), return_inverse=True)
    by_rank = np.argsort(rank[digested])
    best = np.full(group.max() + 1, -1)
    best[group[by_rank[::-1]]] = digested[by_rank[::-1]]
    leader[digested] = best[group]
    return leader
