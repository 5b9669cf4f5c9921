"""Components: against the plain way and scipy's, whatever the parts and their order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dedup.components import Components, components


@settings(max_examples=60, deadline=None)
@given(data=st.data(), size=st.integers(1, 60))
def test_they_are_those_of_a_walk(data: st.DataObject, size: int) -> None:
    node = st.integers(0, size - 1)
    edges = data.draw(st.lists(st.tuples(node, node), max_size=80))
    first, second = (np.asarray([edge[side] for edge in edges], np.int64) for side in (0, 1))
    label = list(range(size))
    for _ in range(size):
        for a, b in edges:
            label[a] = label[b] = min(label[a], label[b])
    assert components(size, [(first, second)]).tolist() == label


@pytest.mark.parametrize("parts", [1, 7, 100])
def test_they_are_scipys_whatever_the_parts(parts: int) -> None:
    draw = np.random.default_rng(parts)
    size, edges = 50_000, draw.integers(0, 50_000, (30_000, 2))
    _, theirs = connected_components(coo_array((np.ones(len(edges)), edges.T), (size, size)), directed=False)
    lowest = np.full(theirs.max() + 1, size)
    np.minimum.at(lowest, theirs, np.arange(size))
    of_parts = [part.T for part in np.array_split(draw.permutation(edges), parts)]
    np.testing.assert_array_equal(components(size, of_parts), lowest[theirs])


def test_forests_of_parts_stand_for_their_edges() -> None:
    draw = np.random.default_rng(0)
    edges = draw.integers(0, 2_000, (4_000, 2))
    forests = []
    for part in np.array_split(edges, 5):
        found = Components(2_000)
        found.join(*part.T)
        forests.append(found.forest())
    assert all(len(first) < 2_000 for first, _ in forests)
    np.testing.assert_array_equal(components(2_000, forests), components(2_000, [edges.T]))


def test_a_long_chain_is_one_component() -> None:
    order = np.random.default_rng(0).permutation(20_000)
    assert not components(20_000, [(order[:-1], order[1:])]).any()


def test_an_edge_to_nowhere_is_named() -> None:
    with pytest.raises(ValueError, match="nodes 0 to 5 of 5: an edge leads nowhere"):
        components(5, [(np.array([0, 5]), np.array([1, 2]))])
