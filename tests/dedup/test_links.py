"""Who goes for whom by equal and near hashes: as decided plainly, all at once, however the batches are cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedup import links
from dedup.batches import Batch, Batches
from dedup.choose import NOBODY, HashGroups, Removals, Settled, by_hash, choose
from dedup.hamming import Pairs
from dedup.links import settled

EVERYTHING = 1000


@dataclass
class Corpus:
    """Samples whose looks lie on a line: neighbours are alike, so that likeness is no equivalence."""

    look: list[int]
    caption: list[int]
    hash: list[int]
    place: list[int]
    leader: list[int]
    pairs: list[tuple[int, int, int]]  # of hashes

    def alike(self, one: int, other: int) -> bool:
        return abs(self.look[one] - self.look[other]) <= 1 and self.caption[one] == self.caption[other]

    def groups(self) -> tuple[HashGroups, Pairs]:
        hashes = np.zeros((len(self.hash), 4), np.uint64)
        hashes[:, 0] = self.hash
        leads = np.flatnonzero(np.asarray(self.leader) == np.arange(len(self.hash)))
        groups = by_hash(hashes, leads, np.asarray(self.place))
        row = {value: number for number, value in enumerate(groups.hashes[:, 0].tolist())}
        pairs = [(row[a], row[b], bits) for a, b, bits in self.pairs if a in row and b in row]
        return groups, np.asarray(pairs, np.int64).reshape(-1, 3)

    def batches(self, most: int) -> Batches:
        captions = np.repeat(np.asarray(self.caption, np.uint64)[:, None], 2, axis=1)
        return Batches(*self.groups(), np.asarray(self.place), captions, most)

    def in_batches(self, most: int) -> Removals:
        look = np.asarray(self.look)

        def parts() -> Iterator[Settled]:
            for batch in self.batches(most):
                mine = look[batch.samples]
                yield settled(batch, lambda first, second, mine=mine: np.abs(mine[first] - mine[second]) <= 1)

        return choose(np.asarray(self.leader), parts())


@st.composite
def corpora(draw: st.DrawFn) -> Corpus:
    size = draw(st.integers(1, 24))

    def each(most: int) -> list[int]:
        return draw(st.lists(st.integers(0, most), min_size=size, max_size=size))

    place = draw(st.permutations(range(size)))
    leader = list(range(size))
    for sample in np.argsort(place)[1:].tolist():
        if draw(st.integers(0, 4)) == 0:
            best = draw(st.sampled_from(sorted(one for one in range(size) if place[one] < place[sample])))
            leader[sample] = leader[best]
    hashes = st.tuples(st.integers(0, 11), st.integers(0, 11)).filter(lambda pair: pair[0] < pair[1])
    near = draw(st.dictionaries(hashes, st.integers(1, 3), max_size=14))
    return Corpus(each(6), each(2), each(11), place, leader, [(a, b, bits) for (a, b), bits in near.items()])


def plainly(corpus: Corpus) -> tuple[list[int], list[int], list[int]]:
    """Return whom each goes for, how far that is, and its component: sample by sample, over the whole corpus."""
    size, best_first = len(corpus.hash), np.argsort(corpus.place).tolist()
    kept, distance, follows, joined = [NOBODY] * size, [0] * size, dict[int, int](), list(enumerate(corpus.leader))
    leads: list[int] = []
    for sample in (one for one in best_first if corpus.leader[one] == one):
        mine = [one for one in leads if corpus.hash[one] == corpus.hash[sample] and corpus.alike(one, sample)]
        if mine:
            follows[sample] = mine[0]
        else:
            leads.append(sample)
    bits = {frozenset((a, b)): distance for a, b, distance in corpus.pairs}
    for at, sample in enumerate(leads):
        gaps = {one: bits.get(frozenset((corpus.hash[one], corpus.hash[sample]))) for one in leads[:at]}
        near = [(gap, place, one) for place, (one, gap) in enumerate(gaps.items()) if gap and corpus.alike(one, sample)]
        joined += [(one, sample) for _, _, one in near]
        staying = [link for link in near if kept[link[2]] == NOBODY]
        if staying:
            distance[sample], _, kept[sample] = min(staying)
    for sample, of in follows.items():
        joined.append((of, sample))
        stays = of if kept[of] == NOBODY else kept[of]
        if stays == of or corpus.alike(stays, sample):
            kept[sample], distance[sample] = stays, distance[of]
    for sample, of in enumerate(corpus.leader):
        if of != sample:
            kept[sample], distance[sample] = (of if kept[of] == NOBODY else kept[of]), distance[of]
    component = list(range(size))
    for _ in range(size):
        for one, other in joined:
            component[one] = component[other] = min(component[one], component[other])
    return kept, distance, component


@settings(max_examples=150, deadline=None)
@given(corpus=corpora(), most=st.sampled_from([1, 2, 7, EVERYTHING]), at_once=st.sampled_from([1, 2, EVERYTHING]))
def test_the_outcome_is_the_plain_one_however_it_is_cut(corpus: Corpus, most: int, at_once: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(links, "_AT_ONCE", at_once)
        found = corpus.in_batches(most)
    assert (found.kept.tolist(), found.distance.tolist(), found.component.tolist()) == plainly(corpus)


def test_who_follows_one_that_goes_stays_where_it_does_not_look_like_the_one_that_stays() -> None:
    """0 and 1 share a hash and look alike; 0 goes for the near 2, the best, which 1 does not look like."""
    corpus = Corpus([1, 2, 0], [0, 0, 0], [0, 0, 1], [1, 2, 0], [0, 1, 2], [(0, 1, 5)])
    found = corpus.in_batches(EVERYTHING)
    assert found.kept.tolist() == [2, NOBODY, NOBODY]
    assert found.distance.tolist() == [5, 0, 0]
    assert found.component.tolist() == [0, 0, 0]


@settings(max_examples=60, deadline=None)
@given(corpus=corpora(), most=st.integers(1, 30))
def test_a_batch_has_whole_components_and_no_more_samples_than_it_may_unless_it_is_one(
    corpus: Corpus, most: int
) -> None:
    batches = corpus.batches(most)
    cut: list[Batch] = list(batches)
    assert (len(batches), batches.samples) == (len(cut), sum(len(one.samples) for one in cut))
    seen = [sample for one in cut for sample in one.samples.tolist()]
    assert len(seen) == len(set(seen))
    kinds = [(corpus.hash[one], corpus.caption[one]) for one, of in enumerate(corpus.leader) if of == one]
    joined = [
        ((a, caption), (b, caption))
        for a, b, _ in corpus.pairs
        for caption in range(3)
        if (a, caption) in kinds and (b, caption) in kinds
    ]
    assert sum(len(one.pairs) for one in cut) == len(joined)
    whole = {
        (corpus.hash[at], corpus.caption[at]): number for number, one in enumerate(cut) for at in one.samples.tolist()
    }
    assert whole.keys() == {one for one in kinds if kinds.count(one) > 1} | {one for pair in joined for one in pair}
    assert all(whole[one] == whole[other] for one, other in joined)
    for one in cut:
        assert len(one.samples) <= most or len(list(Batches(*_groups_of(one), one.place, None, 1))) == 1


def _groups_of(batch: Batch) -> tuple[HashGroups, Pairs]:
    hashes = np.zeros((len(batch.ends) - 1, 4), np.uint64)
    return HashGroups(hashes, np.arange(len(batch.samples)), batch.ends), batch.pairs


def test_batches_are_filled_and_a_large_component_is_alone() -> None:
    """Groups of 2, 2, 9, 2 and 3 samples; the fourth is near the first."""
    ends = np.cumsum([0, 2, 2, 9, 2, 3])
    groups = HashGroups(np.zeros((5, 4), np.uint64), np.arange(18), ends)
    cut = list(Batches(groups, np.array([[0, 3, 5]]), np.arange(18), None, 6))
    assert [one.samples.tolist() for one in cut] == [[0, 1, 13, 14, 2, 3], [*range(4, 13)], [15, 16, 17]]
    assert [one.pairs.tolist() for one in cut] == [[[0, 1, 5]], [], []]


def test_what_has_nothing_to_be_compared_with_is_in_no_batch() -> None:
    groups = HashGroups(np.zeros((3, 4), np.uint64), np.arange(3), np.arange(4))
    for pairs in (np.empty((0, 3), np.int64), np.array([[0, 2, 1]])):
        batches = Batches(groups, pairs, np.arange(3), None, 10)
        assert batches.samples == 2 * len(pairs) == sum(len(one.samples) for one in batches)


def test_a_group_of_samples_that_all_look_alike_takes_a_look_each() -> None:
    looks = 0

    def look(first: np.ndarray, _: np.ndarray) -> np.ndarray:
        nonlocal looks
        looks += len(first)
        return np.ones(len(first), bool)

    size = 50_000
    batch = Batch(np.arange(size), np.array([0, size]), np.empty((0, 3), np.int64), np.arange(size))
    assert (settled(batch, look).kept[1:] == 0).all()
    assert looks == size - 1


@pytest.mark.parametrize("unit", ["image", "pair"])
def test_a_hash_of_many_looks_costs_no_square_of_them(unit: str) -> None:
    """3,000 pictures of one hash, each with a copy, no two others alike; and a near hash of as many."""
    count, compared = 3000, 0
    look = np.concatenate([np.repeat(np.arange(count), 2), np.repeat(np.arange(count), 2)])
    everyone = np.arange(4 * count)
    groups = HashGroups(np.zeros((2, 4), np.uint64), everyone, np.array([0, 2 * count, 4 * count]))
    captions = np.ones((4 * count, 2), np.uint64) if unit == "pair" else None
    (batch,) = Batches(groups, np.array([[0, 1, 7]]), everyone, captions, 1000)

    def same(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        nonlocal compared
        compared += len(first)
        return look[first] == look[second]

    found = settled(batch, same)
    assert compared <= 4 * count * links.MOST_LEADERS + links.MOST_LEADERS**2 + 4 * count
    gone = np.flatnonzero(found.kept != NOBODY)
    assert (look[found.kept[gone]] == look[gone]).all()
    assert sorted(set(look[gone].tolist())) == list(range(links.MOST_LEADERS))
    assert len(gone) == 3 * links.MOST_LEADERS


def test_captions_of_one_picture_that_all_differ_are_compared_with_nothing() -> None:
    """A hash of 20,000 captions, near one of as many others: nothing may go, so nothing is looked at."""
    count = 20_000
    groups = HashGroups(np.zeros((2, 4), np.uint64), np.arange(2 * count), np.array([0, count, 2 * count]))
    captions = np.repeat(np.arange(2 * count, dtype=np.uint64)[:, None], 2, axis=1)
    batches = Batches(groups, np.array([[0, 1, 7]]), np.arange(2 * count), captions, 1000)
    assert (len(batches), batches.samples, list(batches)) == (0, 0, [])


def test_near_pictures_of_many_captions_take_a_look_a_caption() -> None:
    """Two near hashes, each under the same 20,000 captions; the second has 5,000 of its own too."""
    count, own = 20_000, 5_000
    draw, looks = np.random.default_rng(0), 0
    size = 2 * count + own
    caption = np.concatenate([draw.permutation(count), draw.permutation(count + own)]).astype(np.uint64)
    groups = HashGroups(np.zeros((2, 4), np.uint64), np.arange(size), np.array([0, count, size]))
    captions = np.stack([np.zeros(size, np.uint64), caption], axis=1)
    batches = Batches(groups, np.array([[0, 1, 7]]), np.arange(size), captions, 1000)

    def look(first: np.ndarray, _: np.ndarray) -> np.ndarray:
        nonlocal looks
        looks += len(first)
        return np.ones(len(first), bool)

    parts = []
    for batch in batches:
        assert len(batch.samples) <= 1000
        assert len(batch.pairs) * 2 == len(batch.samples)
        parts.append(settled(batch, look))
    assert len(parts) == 2 * count // 1000
    assert looks == count
    found = choose(np.arange(size), parts)
    gone = np.flatnonzero(found.kept != NOBODY)
    assert len(gone) == count
    assert (gone >= count).all()
    assert (caption[found.kept[gone]] == caption[gone]).all()
    assert (found.distance[gone] == 7).all()
