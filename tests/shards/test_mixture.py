"""A mix's order alone: each corpus exactly once in each of its epochs, in its share, whoever reads which lanes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import UserError
from shards.mixture import PLACES, Mixture, shares
from shards.order import Order


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    lanes = draw(st.sampled_from([1, 2, 6, 12]))
    count = draw(st.integers(1, 4))
    weights = draw(st.lists(st.floats(0.02, 5.0), min_size=count, max_size=count))
    orders = tuple(
        Order(
            samples=draw(st.integers(lanes, 600)), global_batch=lanes, lanes=lanes,
            block_samples=draw(st.integers(1, 40)), window_blocks=draw(st.integers(1, 4)),
            seed=draw(st.integers(0, 99)),
        )
        for _ in range(count)
    )  # fmt: skip
    return Mixture(orders, shares(weights), lanes * draw(st.integers(1, 3)))


def taken(mix: Mixture, start: int, stop: int, lanes: range | None = None) -> np.ndarray:
    """What was taken, in slots of steps: rows of (step, slot, corpus, epoch, sample)."""
    rows = [
        np.stack([
            np.full(len(portion.epochs), portion.step.step), portion.step.slot,
            np.full(len(portion.epochs), portion.corpus), portion.epochs, portion.step.sample,
        ], axis=1)
        for portions in mix.walk(start, stop, lanes)
        for portion in portions
    ]  # fmt: skip
    found = np.concatenate(rows)
    return found[np.lexsort((found[:, 1], found[:, 0]))]


@given(mixtures())
@settings(max_examples=60)
def test_each_corpus_exactly_once_in_each_of_its_epochs(mix: Mixture) -> None:
    steps = 3 * max(order.samples for order in mix.orders) // mix.global_batch + 5
    found = taken(mix, 0, steps)
    assert len(found) == steps * mix.global_batch
    assert (found[:, 1] == np.tile(np.arange(mix.global_batch), steps)).all()
    for corpus, order in enumerate(mix.orders):
        ours = found[found[:, 2] == corpus]
        assert len(np.unique(ours[:, 3:], axis=0)) == len(ours)
        lane = ours[:, 1] // mix.lane_slots
        takes = np.bincount(lane, minlength=mix.lanes)
        assert np.abs(takes - steps * mix.lane_slots * mix.shares[corpus] / PLACES).max() < len(mix.orders)
        # Lanes that stand so near each other may still be several epochs apart, where an epoch is a step or two:
        # whole are those that every lane has behind it.
        for epoch in range(takes.min() // order.full_steps):
            assert (ours[:, 3] == epoch).sum() == order.full_steps * order.lanes


@given(mixtures(), st.data())
@settings(max_examples=60)
def test_any_share_of_the_lanes_and_any_start_give_the_same(mix: Mixture, data: st.DataObject) -> None:
    readers = data.draw(st.sampled_from([n for n in range(1, mix.lanes + 1) if mix.lanes % n == 0]))
    start = data.draw(st.integers(0, 40))
    each = mix.lanes // readers
    parts = [taken(mix, start, 50, range(one * each, (one + 1) * each)) for one in range(readers)]
    joined = np.concatenate(parts)
    whole = taken(mix, 0, 50)
    assert (joined[np.lexsort((joined[:, 1], joined[:, 0]))] == whole[whole[:, 0] >= start]).all()


@given(mixtures())
@settings(max_examples=60)
def test_runs_hold_what_they_say_until_nobody_needs_them(mix: Mixture) -> None:
    ends: dict[tuple[int, int], tuple[int, int, int]] = {}
    last_seen: dict[tuple[int, int], int] = {}
    for portions in mix.walk(0, 60):
        for corpus, step, _ in portions:
            columns = (step.run, step.first, step.stop, step.until, step.sample)
            for run, first, stop, until, sample in np.stack(columns, axis=1).tolist():
                assert first <= sample < stop
                assert until >= step.step
                assert ends.setdefault((corpus, run), (first, stop, until)) == (first, stop, until)
                last_seen[corpus, run] = step.step
    assert all(last_seen[name] <= until for name, (_, _, until) in ends.items())


@pytest.mark.parametrize("weights", [(1, 1), (7, 2, 1), (0.999, 0.001), (3, 1, 1, 1, 1)])
def test_shares_are_kept_in_every_batch(weights: tuple[float, ...]) -> None:
    orders = tuple(Order(5000, 64, 64, 8, seed=number) for number in range(len(weights)))
    mix = Mixture(orders, shares(weights), 256)
    found = taken(mix, 0, 500)
    exact = np.array(weights) / sum(weights)
    counts = np.array([np.bincount(found[found[:, 0] == step, 2], minlength=len(weights)) for step in range(500)])
    assert counts.sum(0) / counts.sum() == pytest.approx(exact, abs=0.002)
    assert np.abs(counts - 256 * exact).max() <= 16


def test_shares_add_up_and_bad_weights_are_the_users_mistake() -> None:
    assert shares([1, 1, 1]) == (334, 333, 333)
    assert sum(shares([0.123, 4.567, 8.9])) == PLACES
    for weights in ([], [1, 0], [1, -1], [float("nan"), 1]):
        with pytest.raises(UserError, match="a weight above 0"):
            shares(weights)
    with pytest.raises(UserError, match="less than a thousandth"):
        shares([1, 1e-5])
