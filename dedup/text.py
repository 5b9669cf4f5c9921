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
Digests = npt.NDArray[np.uint16]
_AT_ONCE = 65_536


def shingles(caption: str) -> list[str]:
    """Return the words of a caption and the pairs of words that follow each other; every digit as 0."""
    words = re.sub(r"\d", "0", unicodedata.normalize("NFKC", caption).casefold()).split()
    return words + [f"{one} {other}" for one, other in itertools.pairwise(words)]


def digests(captions: Sequence[str]) -> Digests:
    """Return the MinHash of each caption, `[N, 128]`: 256 bytes each.

    Of each number the lower half is kept; two that differ agree in it once in 65,536 times, which tells nothing (Li and
    Koenig, "b-Bit Minwise Hashing", 2010, section 2).
    """
    found = np.empty((len(captions), PERMUTATIONS), np.uint16)
    for at in range(0, len(captions), _AT_ONCE):
        part = [shingles(caption) for caption in captions[at : at + _AT_ONCE]]
        whole = np.asarray(RMinHash.digests_from_token_sets(part, PERMUTATIONS, SEED), np.uint32)
        found[at : at + len(part)] = whole.astype(np.uint16)
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
    rows, size = rows_of_a_band(similarity), len(digest)
    pairs = [np.empty(0, np.int64)]  # each as one number, leader * N + follower
    for band in range(PERMUTATIONS // rows):
        words = _hashed(digest[:, band * rows : (band + 1) * rows])
        _, first, group = np.unique(words, return_index=True, return_inverse=True)
        leader = first[group]
        follower = np.flatnonzero(leader != np.arange(size))
        pairs.append(leader[follower] * size + follower)
    leader, follower = np.divmod(np.unique(np.concatenate(pairs)), max(1, size))
    agreement = np.empty(len(leader))
    for at in range(0, len(leader), _AT_ONCE):
        some = slice(at, at + _AT_ONCE)
        agreement[some] = (digest[leader[some]] == digest[follower[some]]).mean(axis=1)
    near = np.flatnonzero(agreement >= similarity)
    near = near[np.lexsort((leader[near], -agreement[near], follower[near]))]
    return np.stack([leader[near], follower[near]], axis=1)


def _hashed(band: Digests) -> npt.NDArray[np.uint64]:
    """Return a number for each row of `[N, R]`, the same for equal ones: numbers are sorted much faster than rows."""
    factors = 2 * np.random.default_rng(SEED).integers(0, 2**63, (band.shape[1],), dtype=np.uint64) + 1
    found = np.zeros(len(band), np.uint64)
    for column in range(band.shape[1]):
        found += (band[:, column].astype(np.uint64) + np.uint64(1)) * factors[column]
    return found


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
