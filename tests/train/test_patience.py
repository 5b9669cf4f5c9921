"""How long a step may take before somebody is said to be late."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.patience import SLACK_S, Patience

SECONDS = st.floats(min_value=0.01, max_value=1000)


@given(SECONDS, st.integers(min_value=1, max_value=50))
def test_constant_steps_give_no_alarm(took_s: float, steps: int) -> None:
    patience = Patience(20.0)
    for _ in range(steps):
        patience.stepped(took_s)
        assert patience.for_step_s() > took_s
        assert patience.for_step_s() <= max(20.0, took_s + SLACK_S) + 1e-6


@given(st.lists(SECONDS))
def test_what_is_no_step_is_late_a_minute_after_the_longest(lasted_s: list[float]) -> None:
    patience = Patience(20.0)
    for one in lasted_s:
        patience.lasted(one)
    assert patience.for_other_s() == max(lasted_s, default=0.0) + SLACK_S


def test_the_first_step_may_take_a_minute() -> None:
    assert Patience(20.0).for_step_s() == SLACK_S
    assert Patience(90.0).for_step_s() == 90.0


def test_a_first_step_that_was_compiled_is_forgotten() -> None:
    patience = Patience(20.0)
    patience.stepped(600.0)
    patience.stepped(1.0)
    assert patience.for_step_s() == pytest.approx(20.0)


def test_nobody_is_late_where_nobody_can_know() -> None:
    assert Patience(20.0, math.inf).for_other_s() == math.inf
