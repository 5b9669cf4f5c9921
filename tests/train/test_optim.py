"""The learning rate over a run, a function of samples seen."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.optim import OptimConfig, learning_rate

SCHEDULES = ("cosine", "constant", "wsd")


def rates(schedule: str, batch: int, total: int = 1000, warmup: int = 100, decay: int = 200) -> dict[int, float]:
    config = OptimConfig.model_validate({"learning_rate": 2.0, "schedule": schedule})
    return {seen: learning_rate(config, seen, warmup, total, decay) for seen in range(0, total + 1, batch)}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warms_up_in_a_line(schedule: str) -> None:
    found = rates(schedule, 10)
    assert [found[seen] for seen in (0, 50, 100)] == [0.0, 1.0, 2.0]


def test_wsd_is_flat_and_then_falls_as_one_less_a_root() -> None:
    found = rates("wsd", 50)
    assert {found[seen] for seen in range(100, 801, 50)} == {2.0}
    assert found[850] == pytest.approx(2 * (1 - math.sqrt(0.25)))
    assert found[1000] == 0.0


def test_cosine_is_half_way_down_in_the_middle() -> None:
    found = rates("cosine", 50)
    assert found[550] == pytest.approx(1.0)
    assert found[1000] == pytest.approx(0.0)


@given(st.sampled_from(SCHEDULES), st.sampled_from([1, 2, 5, 20, 50]))
def test_the_batch_does_not_bend_it(schedule: str, batch: int) -> None:
    """What another batch size passes through, this one does too."""
    fine, coarse = rates(schedule, 1), rates(schedule, batch)
    assert all(fine[seen] == rate for seen, rate in coarse.items())
    after = [rate for seen, rate in fine.items() if seen >= 100]
    assert after == sorted(after, reverse=True)
