"""Links to the best samples: the same however their pairs were cut, with the components of all of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedup import best_links
from dedup.best_links import BestLinks
from dedup.components import components
from dedup.semantic import NearPairs


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), size=st.integers(2, 30), parts=st.integers(1, 4), most=st.integers(1, 5))
def test_parts_held_apart_come_to_what_all_pairs_do(seed: int, size: int, parts: int, most: int) -> None:
    draw = np.random.default_rng(seed)
    first, second = np.triu_indices(size, 1)
    some = draw.permutation(len(first))[: draw.integers(0, len(first) + 1)]
    pairs = NearPairs(first[some], second[some], draw.random(len(some), np.float32))
    place = draw.permutation(size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(best_links, "MOST_LINKS", most)
        patch.setattr(best_links, "_HELD_PAIRS", 8)
        whole = BestLinks(place)
        for at in range(len(some)):
            whole.add(NearPairs(*(column[at : at + 1] for column in pairs)))
        merged = BestLinks(place)
        for number in range(parts):
            one = BestLinks(place)
            one.add(NearPairs(*(column[number::parts] for column in pairs)))
            merged.merge(one.found(np.arange(size)))
        links = merged.best()
        for ours, theirs in zip(links, whole.best(), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert merged.count == whole.count == len(some)
    expected = components(size, [(pairs.first, pairs.second)])
    assert merged.components.labels().tolist() == whole.components.labels().tolist() == expected.tolist()
    better, worse, _ = links
    assert (place[better] < place[worse]).all()
    for sample in range(size):
        theirs = np.concatenate([pairs.first[pairs.second == sample], pairs.second[pairs.first == sample]])
        wanted = sorted(one for one in place[theirs].tolist() if one < place[sample])[:most]
        assert sorted(place[better[worse == sample]].tolist()) == wanted


def test_numbers_of_samples_are_those_of_whoever_asked() -> None:
    links = BestLinks(np.array([1, 0, 2]))
    links.add(NearPairs(np.array([0]), np.array([1]), np.array([0.9], np.float32)))
    found = links.found(np.array([40, 50, 60]))
    assert (found.links.first.tolist(), found.links.second.tolist()) == ([50], [40])
    assert [side.tolist() for side in found.edges] == [[50], [40]]
    assert found.pairs == 1
