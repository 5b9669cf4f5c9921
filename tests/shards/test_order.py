"""The order alone: exactly once an epoch, whoever reads which lanes, at any size."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import UserError
from shards.order import (
    MOST_BLOCK_SAMPLES,
    Order,
    default_block_samples,
    default_lanes,
    permute,
    substitute,
)

GOLDEN = [
    [3, 12, 49, 39, 22, 27, 31, 16],
    [10, 9, 40, 41, 23, 38, 18, 19],
    [43, -1, -1, -1, 44, -1, -1, -1],
]
FAR = [9411128, 4638754, 54489350, 211346561, 362982596, 270751877, 362820392, 239651379]


@st.composite
def orders(draw: st.DrawFn, most: int = 3000) -> Order:
    lanes = draw(st.sampled_from([1, 2, 4, 6, 12, 24]))
    batch = lanes * draw(st.integers(1, 4))
    remainder = draw(st.sampled_from(["drop", "pad", "keep"]))
    least = batch if remainder == "drop" else 1
    return Order(
        samples=draw(st.integers(least, most)),
        global_batch=batch,
        lanes=lanes,
        block_samples=draw(st.integers(1, 300)),
        window_blocks=draw(st.integers(1, 9)),
        seed=draw(st.integers(-5, 2**70)),
        remainder=remainder,
    )


@given(orders(), st.integers(0, 3))
def test_every_sample_exactly_once_an_epoch(order: Order, epoch: int) -> None:
    batches = [order.batch(epoch, step) for step in range(order.steps)]
    slots = np.concatenate(batches)
    taken = slots[slots >= 0]
    counts = np.bincount(taken, minlength=order.samples)
    full = np.concatenate([np.empty(0, dtype=np.int64), *batches[: order.full_steps]])
    assert len(np.unique(full)) == len(full) == order.full_steps * order.global_batch
    if order.remainder == "drop":
        assert counts.sum() == order.samples - order.samples % order.global_batch
        assert counts.max() == 1
    elif order.remainder == "keep":
        assert (counts == 1).all()
        assert (slots >= 0)[: order.full_steps * order.global_batch].all()
    else:
        assert (counts >= 1).all()
        assert len(taken) == order.steps * order.global_batch


@given(orders(most=800), st.integers(0, 2), st.data())
def test_any_share_of_the_lanes_gives_the_same_slots(order: Order, epoch: int, data: st.DataObject) -> None:
    readers = data.draw(st.sampled_from([n for n in range(1, order.lanes + 1) if order.lanes % n == 0]))
    start = data.draw(st.integers(0, order.steps))
    each = order.lanes // readers
    joined = np.full((order.steps, order.global_batch), -1)
    for reader in range(readers):
        for step in order.walk(epoch, start, lanes=range(reader * each, (reader + 1) * each)):
            assert (joined[step.step, step.slot] == -1).all()
            joined[step.step, step.slot] = step.sample
    for number in range(start, order.steps):
        assert (joined[number] == order.batch(epoch, number)).all()
    assert (joined[:start] == -1).all()


@given(orders())
def test_runs_hold_what_they_say_and_are_read_once(order: Order) -> None:
    runs: dict[tuple[int, int], tuple[int, int, int]] = {}
    bytes_read = 0
    for step in order.walk(1):
        columns = (step.run, step.first, step.stop, step.until, step.sample)
        for run, first, stop, until, sample in np.stack(columns, axis=1).tolist():
            assert first <= sample < stop
            assert stop - first <= order.block_samples
            assert until >= step.step
            name = (step.step if step.step == order.full_steps else -1, run)
            bytes_read += (stop - first) * (name not in runs)
            assert runs.setdefault(name, (first, stop, until)) == (first, stop, until)
    # Nothing is read that is not wanted, but for the seams at the end of an epoch.
    assert bytes_read <= order.samples + order.global_batch


@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation_and_its_inverse(size: int, key: int) -> None:
    here = np.arange(size)
    there = permute(here, size, np.uint64(key))
    assert (np.sort(there) == here).all()
    assert (permute(there, size, np.uint64(key), inverse=True) == here).all()


@settings(max_examples=25)
@given(
    st.integers(10**6, 4 * 10**8),
    st.sampled_from([(256, 256), (4096, 1024), (32768, 1024)]),
    st.integers(0, 2**32),
    st.integers(0, 10**6),
)
def test_hundreds_of_millions_without_allocating(samples: int, batch: tuple[int, int], seed: int, where: int) -> None:
    order = Order(samples, batch[0], batch[1], MOST_BLOCK_SAMPLES, seed=seed, remainder="keep")
    step = where % order.steps
    tracemalloc.start()
    slots = np.concatenate([order.batch(7, each) for each in range(step, min(step + 3, order.steps))])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    taken = slots[slots >= 0]
    assert len(np.unique(taken)) == len(taken)
    assert taken.min() >= 0
    assert taken.max() < samples
    assert peak < 64 * 2**20
    # A lane's window holds all samples of its blocks' parts and no other.
    (one,) = order.walk(7, order.full_steps // 2, order.full_steps // 2 + 1)
    assert (one.first // MOST_BLOCK_SAMPLES == (one.stop - 1) // MOST_BLOCK_SAMPLES).all()


def test_the_order_is_this_one() -> None:
    """A run that goes on under a later version must find the order it began with."""
    order = Order(samples=50, global_batch=8, lanes=4, block_samples=3, window_blocks=2, seed=7, remainder="keep")
    assert [order.batch(2, step).tolist() for step in (0, 3, 6)] == GOLDEN
    far = Order(400_000_000, 32_768, 1024, MOST_BLOCK_SAMPLES, seed=7).batch(1, 6000)
    assert far[::4096].tolist() == FAR


def test_epochs_and_seeds_differ() -> None:
    def first(seed: int, epoch: int) -> list[int]:
        return Order(10_000, 100, 100, 16, seed=seed).batch(epoch, 0).tolist()

    assert first(0, 0) == first(0, 0)
    assert first(0, 0) != first(0, 1) != first(1, 0)
    dropped = [
        set(range(10_050))
        - {int(sample) for step in range(100) for sample in Order(10_050, 100, 100, 16).batch(epoch, step)}
        for epoch in range(3)
    ]
    assert dropped[0] != dropped[1] != dropped[2]


def test_neighbours_are_parted_even_in_a_small_corpus() -> None:
    samples, batch = 4000, 256
    block = default_block_samples(samples, batch, default_lanes(batch), 20_000)
    order = Order(samples, batch, default_lanes(batch), block)
    step_of = np.empty((2, samples))
    step_of.fill(np.nan)
    for epoch in range(2):
        for step in range(order.steps):
            step_of[epoch, order.batch(epoch, step)] = step
    for epoch in range(2):
        here = step_of[epoch]
        both = ~np.isnan(here[1:] + here[:-1])
        assert abs(np.corrcoef(here[1:][both], here[:-1][both])[0, 1]) < 0.1
    both = ~np.isnan(step_of.sum(axis=0))
    assert abs(np.corrcoef(step_of[0][both], step_of[1][both])[0, 1]) < 0.1


def test_defaults() -> None:
    assert default_lanes(256) == 256
    assert default_lanes(32_768) == 1024
    assert default_lanes(1030) == 515
    assert default_block_samples(400_000_000, 32_768, 1024, 30_000) == MOST_BLOCK_SAMPLES
    assert default_block_samples(10, 256, 256, 30_000) == 1
    # Few ranks: windows are kept within memory.
    assert default_block_samples(4_000_000, 1024, 1024, 30_000) * 8 * 1024 * 30_000 <= 1024 * 4 * 2**20


@given(st.integers(0, 10**9), st.integers(1, 10**9))
def test_substitutes_are_fixed_and_inside(hole: int, samples: int) -> None:
    hole %= samples
    tried = list(substitute(hole, samples))
    assert tried == list(substitute(hole, samples))
    assert all(0 <= number < samples for number in tried)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"samples": 99}, "holds 99 samples, less than a global batch of 100"),
        ({"samples": 0}, "no samples"),
        ({"lanes": 3}, "3 do not divide the global batch of 100"),
        ({"block_samples": 0}, "block_samples: 0"),
        ({"remainder": "wrap"}, "'wrap'"),
    ],
)
def test_what_does_not_work_out_is_the_users_mistake(changed: dict[str, object], words: str) -> None:
    good = {"samples": 1000, "global_batch": 100, "lanes": 10, "block_samples": 8}
    with pytest.raises(UserError, match=words):
        Order(**(good | changed))  # type: ignore[arg-type]
