"""Boilerplate captions: against the plain Jaccard similarity, and the cap on each."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedup.text import alike, digests, over_cap, shingles
from infra.errors import UserError

BEFORE = "royalty free stock photo number"
SUBJECTS = [f"{colour} {animal}" for colour in ("red", "old", "tiny") for animal in ("fox", "heron", "whale", "beetle")]


def jaccard(one: str, other: str) -> float:
    first, second = set(shingles(one)), set(shingles(other))
    return len(first & second) / len(first | second)


def test_boilerplate_follows_the_first_and_other_captions_stay_alone() -> None:
    captions = [f"{BEFORE} {number} of a dog" for number in (100, 234, 999, 555)] + SUBJECTS
    follows = alike(digests(captions), 0.9).tolist()
    assert follows == [0, 0, 0, 0, *range(4, len(captions))]


@pytest.mark.parametrize("similarity", [0.6, 0.8, 0.95])
def test_what_is_much_more_similar_follows_and_what_is_much_less_does_not(similarity: float) -> None:
    draw = np.random.default_rng(0)
    words = np.array([f"w{chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(600)])
    captions = []
    for _ in range(60):  # one caption, and it with some of its words replaced
        base = draw.choice(words, 40, replace=False)
        for changed in (0, 1, 3, 12):
            other = base.copy()
            other[draw.choice(40, changed, replace=False)] = draw.choice(words, changed)
            captions.append(" ".join(other))
    follows = alike(digests(captions), similarity)
    for number, leader in enumerate(follows.tolist()):
        of_base = jaccard(captions[number], captions[number // 4 * 4])
        if leader != number:
            assert jaccard(captions[number], captions[leader]) > similarity - 0.2
        else:
            assert number % 4 == 0 or of_base < similarity + 0.2


def test_a_caption_follows_none_that_follows_another() -> None:
    chain = [" ".join(f"w{chr(97 + n)}" for n in range(start, start + 20)) for start in range(6)]
    follows = alike(digests(chain), 0.75)
    assert (follows[follows] == follows).all()
    assert len(set(follows.tolist())) > 1


def test_of_several_the_most_similar_is_followed() -> None:
    """The third agrees with the first in 84 numbers of 128, with the second in 90; those two agree in 46."""
    third = np.arange(128)
    first, second = np.where(third < 84, third, third + 1000), np.where(third >= 38, third, third + 2000)
    assert alike(np.stack([first, second, third]).astype(np.uint16), 0.6).tolist() == [0, 1, 1]
    assert alike(np.stack([second, first, third]).astype(np.uint16), 0.6).tolist() == [0, 1, 0]


def test_captions_without_words_are_alike_and_none_make_no_groups() -> None:
    assert alike(digests([" ", "\t", "a"]), 0.9).tolist() == [0, 0, 2]
    assert alike(digests([]), 0.9).tolist() == []


@pytest.mark.parametrize("similarity", [0.0, 1.1, float("nan")])
def test_a_similarity_that_cannot_be(similarity: float) -> None:
    with pytest.raises(UserError, match="is not above 0 and at most 1"):
        alike(digests(["a"]), similarity)


@settings(max_examples=60, deadline=None)
@given(groups=st.lists(st.integers(0, 4), max_size=40), cap=st.integers(1, 5), seed=st.integers(0, 99))
def test_the_best_of_each_group_stay(groups: list[int], cap: int, seed: int) -> None:
    place = np.random.default_rng(seed).permutation(len(groups))
    kept = over_cap(np.asarray(groups, np.int64), place, cap)
    for group in set(groups):
        members = sorted((n for n, of in enumerate(groups) if of == group), key=lambda n: place[n])
        assert [int(kept[n]) for n in members] == [-1] * min(cap, len(members)) + [members[0]] * (len(members) - cap)
