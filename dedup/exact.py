"""Samples whose bodies are equal to the byte, or bodies and captions."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dedup.config import Unit
from dedup.signature import Signatures


def same_body(signatures: Signatures, rank: npt.NDArray[np.int64], unit: Unit = "image") -> npt.NDArray[np.int64]:
    """Return for each of `N` samples the one that stands for all with its `sha256`: that of lowest `rank`.

    Of a `pair` the normalised caption has to be the same too. A sample without a digest stands for itself.
    """
    leader = np.arange(len(signatures))
    digested = np.flatnonzero(signatures.has_sha256)
    if not len(digested):
        return leader
    digests = [_bytes(signatures.sha256[digested])]
    if unit == "pair":
        digests.append(_bytes(signatures.caption_digest[digested]))
    rows = np.ascontiguousarray(np.concatenate(digests, axis=1))
    _, group = np.unique(rows.view(f"V{rows.shape[1]}").ravel(), return_inverse=True)
    by_rank = np.argsort(rank[digested])
    best = np.full(group.max() + 1, -1)
    best[group[by_rank[::-1]]] = digested[by_rank[::-1]]
    leader[digested] = best[group]
    return leader


def _bytes(digests: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(digests).view(np.uint8).reshape(len(digests), -1)
