"""Captions that say nearly the same under many pictures, and which samples go beyond a cap on each.

MinHash (Broder, "On the resemblance and containment of documents", 1997) of a caption's words and pairs of words, all
digits being alike: "Stock photo 1234 of a dog" is the boilerplate that "Stock photo 7788 of a dog" is. Captions that
agree on one of the bands of their digests are compared (Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets",
section 3.4), each with the best one of the band, and follow it where enough of the digests agrees.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from rensa import RMinHash

from infra.errors import UserError

PERMUTATIONS, SEED = 128, 1
MEET = 0.99
"""The share of pairs just similar enough that bands bring together."""
Indices = npt.NDArray[np.int64]
Digests = npt.NDArray[np.uint32]
_AT_ONCE = 65_536


def shingles(caption: str) -> list[str]:
    """Return the words of a caption and the pairs of words that follow each other; every digit as 0."""
    words = re.sub(r"\d", "0", unicodedata.normalize("NFKC", caption).casefold()).split()
    return words + [f"{one} {other}" for one, other in itertools.pairwise(words)]


def digests(captions: Sequence[str]) -> Digests:
    """Return the MinHash of each caption, `[N, 128]`: 512 bytes each."""
    found = np.empty((len(captions), PERMUTATIONS), np.uint32)
    for at in range(0, len(captions), _AT_ONCE):
        part = [shingles(caption) for caption in captions[at : at + _AT_ONCE]]
        found[at : at + len(part)] = RMinHash.digests_from_token_sets(part, PERMUTATIONS, SEED)
    return found


def alike(digest: Digests, similarity: float) -> Indices:
    """Return for each of `N` captions, best first, the one that it follows: itself or a better one, `[N]`.

    A caption follows one that follows no other, and whose estimated Jaccard similarity to it is `similarity` or more;
    of several the most similar.

    Raises:
        UserError: `similarity` is not in (0, 1].
    """
    if not 0 < similarity <= 1:
        raise UserError(f"similarity: {similarity} is not above 0 and at most 1")
    follows = np.arange(len(digest))
    for leader, follower in _links(digest, similarity).tolist():
        if follows[leader] == leader and follows[follower] == follower:
            follows[follower] = leader
    return follows


def rows_of_a_band(similarity: float) -> int:
    """Return how many numbers of a digest make a band: the most with which pairs of `similarity` still meet."""
    for rows in (32, 16, 8, 4, 2):
        if 1 - (1 - similarity**rows) ** (PERMUTATIONS // rows) >= MEET:
            return rows
    return 1


def _links(digest: Digests, similarity: float) -> Indices:
    """Return `[L, 2]` leader and follower that are similar enough: by follower, the most similar leader first."""
    rows = rows_of_a_band(similarity)
    pairs = [np.empty((0, 2), np.int64)]
    for band in range(PERMUTATIONS // rows):
        words = np.ascontiguousarray(digest[:, band * rows : (band + 1) * rows])
        _, first, group = np.unique(words.view(f"V{4 * rows}").ravel(), return_index=True, return_inverse=True)
        leader, follower = first[group], np.arange(len(digest))
        pairs.append(np.stack([leader, follower], axis=1)[leader != follower])
    unique = np.unique(np.concatenate(pairs), axis=0)
    agreement = np.empty(len(unique))
    for at in range(0, len(unique), _AT_ONCE):
        leader, follower = unique[at : at + _AT_ONCE].T
        agreement[at : at + len(leader)] = (digest[leader] == digest[follower]).mean(axis=1)
    near = agreement >= similarity
    leader, follower = unique[near].T
    return unique[near][np.lexsort((leader, -agreement[near], follower))]


def over_cap(group: Indices, place: Indices, cap: int) -> Indices:
    """Return for each of `N` samples the best one of its `group`, if it is beyond the best `cap` of it; -1 if not.

    `place` is the samples' rank, 0 for the best.
    """
    order = np.lexsort((place, group))
    by_group = group[order]
    starts = np.flatnonzero(np.concatenate([[True], by_group[1:] != by_group[:-1]])) if len(order) else order
    sizes = np.diff(np.append(starts, len(order)))
    nth = np.arange(len(order)) - np.repeat(starts, sizes)
    best = np.repeat(order[starts], sizes)
    kept = np.full(len(group), -1)
    kept[order] = np.where(nth >= cap, best, -1)
    return kept
