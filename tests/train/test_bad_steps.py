"""Steps that must not be taken: dropped on all ranks together or the end of the run, and their keys on record."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.errors import RunError
from train import checkpoint
from train.bad_steps import StepGuard
from train.config import RunConfig
from train.launch import prepare, train
from train.loop import fit, resumed, train_step
from train.optim import OptimConfig
from train.state import TrainingState, build

MakeConfig = Callable[..., RunConfig]


def recorded(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "bad-steps.jsonl").read_text().splitlines()]


def built(config: RunConfig, run: Path) -> TrainingState:
    prepare(config, run, 1)
    return build(config, run)


def test_a_dropped_step_leaves_no_trace_but_the_record(tmp_path: Path, make_config: MakeConfig) -> None:
    """Weights, moments, averages and running statistics stay; step and samples go on; then training does too."""
    state = built(make_config(optim={"on_bad_step": "skip", "spike": 3.0, "ema": 0.9}), tmp_path)
    batches = iter(state.data)
    assert train_step(state, next(batches))
    before = {name: value.clone() for name, value in state.tensors().items()}
    state.guard.mean_loss = 1e-6  # so that the next loss is a leap
    batch = next(batches)
    assert train_step(state, batch) == {}
    for name, value in state.tensors().items():
        assert torch.equal(value, before[name]), name
    assert (state.step, state.samples, state.guard.dropped) == (2, 32, 1)
    (line,) = recorded(tmp_path)
    assert line["keys"] == list(batch.keys)
    assert (line["step"], line["rank"]) == (1, 0)
    assert "times its running mean" in line["fault"]
    state.guard.mean_loss = 10.0
    assert train_step(state, next(batches))["loss"] > 0
    assert state.guard.in_a_row == 0
    batches.close()  # type: ignore[attr-defined]


def test_a_nan_in_the_forward_pass_does_not_stay_in_the_statistics(tmp_path: Path, make_config: MakeConfig) -> None:
    """One parameter is made infinite for a step: everything is NaN then, and nothing afterwards."""
    state = built(make_config(optim={"on_bad_step": "skip"}), tmp_path)
    batches = iter(state.data)
    weight = next(state.model.visual.parameters())
    sound = weight.detach().clone()
    weight.data[0] = torch.inf
    assert train_step(state, next(batches)) == {}
    weight.data.copy_(sound)
    assert all(torch.isfinite(value).all() for value in state.tensors().values())
    assert recorded(tmp_path)[0]["gradient_norm"] == "nan"
    assert train_step(state, next(batches))["loss"] > 0
    batches.close()  # type: ignore[attr-defined]


def test_too_many_in_a_row_end_the_run(tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config(
        optim={"learning_rate": 1e30, "clip_norm": 0.0, "warmup": "0 steps", "on_bad_step": "skip", "max_bad_steps": 3}
    )
    with pytest.raises(RunError, match=r"the last 3 steps were all dropped .* all are in .*bad-steps.jsonl") as caught:
        train(config, tmp_path / "run", 1)
    assert "\n" not in str(caught.value)
    assert len(recorded(tmp_path / "run")) == 3


def test_all_ranks_drop_the_same_steps(tmp_path: Path, make_config: MakeConfig) -> None:
    """A high learning rate and a low bound: some steps are dropped, and the keys of each rank are there."""
    optim = {"learning_rate": 0.05, "warmup": "0 steps", "on_bad_step": "skip", "spike": 1.01, "max_bad_steps": 12}
    config = make_config(optim=optim)
    run = tmp_path / "run"
    assert train(config, run, 2)["steps"] == 12
    lines = recorded(run)
    steps = {line["step"] for line in lines}
    assert 0 < len(steps) < 12
    assert sorted((line["step"], line["rank"]) for line in lines) == sorted((s, r) for s in steps for r in (0, 1))
    assert all(len(line["keys"]) == 8 for line in lines)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert log[-1]["dropped_steps"] == len(steps)
    assert [line["step"] - 1 for line in log if "loss" not in line] == sorted(steps)
    state = checkpoint.load_newest(run / "checkpoints")
    assert state is not None
    assert state["guard"]["dropped"] == len(steps)
    assert all(value == 12 - len(steps) for name, value in state["optimizer"].items() if name.endswith(".step"))


def test_a_resume_leaves_each_bad_step_once(tmp_path: Path, make_config: MakeConfig) -> None:
    """Steps 1 and 3 are bad, the checkpoint is of step 2: the second is taken again, bad again, on record once.

    The log's lines, one each 4 steps, say over how many their means are.
    """
    optim = {"on_bad_step": "skip", "spike": 1e3, "ema": 0.0}
    config = make_config(
        length="8 steps", optim=optim, checkpoint={"every": "2 steps", "keep": 9}, log={"every": "4 steps"}
    )
    prepare(config, tmp_path, 1)

    def started(steps: int) -> None:
        state = resumed(build(config, tmp_path), tmp_path)

        def leap() -> bool:
            # Asked in a step before it is judged, counted from 1.
            if state.step in (2, 4):
                state.guard.seen, state.guard.mean_loss = 1, 1e-6
            elif state.guard.mean_loss == 1e-6:
                state.guard.seen = 0
            return state.step == steps

        fit(state, tmp_path, leap)

    started(5)
    assert [line["step"] for line in recorded(tmp_path)] == [1, 3]
    for name in ("step-00000004", "step-00000005"):
        shutil.rmtree(tmp_path / "checkpoints" / name)
    started(8)
    assert [line["step"] for line in recorded(tmp_path)] == [1, 3]
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["averaged_steps"]) for line in log] == [(4, 1), (8, 4)]


def test_a_resumed_run_judges_as_before(tmp_path: Path, make_config: MakeConfig) -> None:
    """How many were dropped, how many in a row, and the running mean, are the checkpoint's."""
    config = make_config(optim={"on_bad_step": "skip", "spike": 3.0})
    state = built(config, tmp_path)
    state.guard.dropped, state.guard.in_a_row, state.guard.seen, state.guard.mean_loss = 5, 2, 40, 1.5
    with checkpoint.Saver(state, tmp_path) as saver:
        saver.save()
    guard = resumed(build(config, tmp_path), tmp_path).guard
    assert (guard.dropped, guard.in_a_row, guard.seen, guard.mean_loss) == (5, 2, 40, 1.5)
    assert "times its running mean" in guard.fault(4.6, 1.0)


def test_the_running_mean(tmp_path: Path) -> None:
    """Of the first steps all count alike; a leap does not move it; it is gone on with."""
    guard = StepGuard(OptimConfig(spike=2.0), tmp_path)
    assert [guard.fault(loss, 1.0) for loss in (3.0, 5.0, 4.0)] == ["", "", ""]
    assert guard.mean_loss == pytest.approx(4.0)
    assert "2.25 times" in guard.fault(9.0, 1.0)
    other = StepGuard(OptimConfig(spike=2.0), tmp_path)
    other.load_state_dict(guard.state_dict())
    assert other.mean_loss == pytest.approx(4.0)
    assert not other.fault(7.9, 1.0)
    assert "not finite" in guard.fault(1.0, float("inf"))
