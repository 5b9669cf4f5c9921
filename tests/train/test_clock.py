"""What of the time is training, and whom a long measurement makes suspect."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from tests.train.forked import become_ranks, run_ranks
from train.clock import TrainingClock
from train.config import RunConfig
from train.evaluate.suite import write_suite
from train.heartbeat import STALLS_NAME, Heartbeat
from train.launch import prepare
from train.loop import fit
from train.state import build

STALL_S, PATIENCE_S = 0.6, 100
SECONDS = st.floats(0.01, 1000)


@given(st.lists(st.tuples(SECONDS, SECONDS, SECONDS), min_size=1, max_size=5))
def test_measurements_and_pauses_are_left_out(laps: list[tuple[float, float, float]]) -> None:
    """Laps of so much training, measuring and waiting for a checkpoint."""
    at = 0.0
    clock, pause_s = TrainingClock(lambda: at), 0.0
    for trained, measured, paused in laps:
        at += trained
        with clock.measuring():
            at += measured
        at += paused
        pause_s += paused
        assert clock.lap(pause_s) == pytest.approx(trained, abs=1e-6)
    assert clock.evaluate_s == pytest.approx(sum(measured for _, measured, _ in laps))


def test_a_line_says_what_measurements_took(
    tmp_path: Path, make_config: Callable[..., RunConfig], drawing: Callable[[str, str, int], bytes]
) -> None:
    """All of this start so far: none before the first."""
    suite = tmp_path / "suite"
    pictures = [
        {"key": f"{number:03d}", "png": drawing("red", "circle", number), "cls": 0, "txt": "a red circle"}
        for number in range(24)
    ]
    write_suite(str(suite), pictures, ("red",), ("{c}",))
    config = make_config(length="4 steps", evaluate={"suite": str(suite), "every": "1 steps"})
    run = tmp_path / "run"
    prepare(config, run, 1)
    fit(build(config, run), run, lambda: False)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in lines if "zero_shot" in line] == [1, 2, 3, 4]
    spent = [line["evaluate_s"] for line in steps]
    assert spent[0] == 0.0
    assert spent == sorted(set(spent))


def test_a_measurement_is_no_stall(tmp_path: Path) -> None:
    """Two ranks that take no step: not named in the midst of a measurement, named outside of one."""
    run_ranks(__file__, 2, str(tmp_path), PATIENCE_S)
    assert (tmp_path / "quiet").exists()
    assert json.loads((tmp_path / STALLS_NAME).read_text().splitlines()[0])["step"] == 3


def stand_still(folder: str) -> None:
    """Take no step for a while within a measurement, then until it is noticed."""
    stalls = Path(folder) / STALLS_NAME
    with Heartbeat(lambda: 3, Path(folder), STALL_S) as beats:
        with beats.at_length():
            time.sleep(4 * STALL_S)
            dist.barrier()
            if dist.get_rank() == 0 and not stalls.exists():
                (Path(folder) / "quiet").touch()
            dist.barrier()
        while not stalls.exists():
            time.sleep(0.05)


if __name__ == "__main__":
    become_ranks(stand_still)
