"""A checkpoint is the moment of its save, however late its tensors are copied."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager

from tests.train.conftest import drawing
from train import checkpoint
from train.config import RunConfig
from train.evaluate import together
from train.evaluate.suite import write_suite
from train.launch import prepare
from train.loop import fit, train_step
from train.state import build

MakeConfig = Callable[..., RunConfig]
LATE_S, PATIENCE_S = 0.5, 60
"""How late a copy begins, far longer than a step takes; and how long a test waits for one."""


def written(run: Path) -> dict[int, dict[str, Tensor]]:
    """All tensors of all checkpoints, by step."""
    found = checkpoint.saved(run / "checkpoints")
    return {one.step: load_file(Path(one.path) / "rank-00000.safetensors") for one in found}


def test_what_is_written_is_the_moment_of_the_save(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on before it is copied; nothing of later steps gets in, a second waits for the first."""
    copy = DefaultStager._stage

    def late(self: DefaultStager, tensors: Any, **options: Any) -> Any:
        time.sleep(LATE_S)
        return copy(self, tensors, **options)

    monkeypatch.setattr(DefaultStager, "_stage", late)
    config = make_config(checkpoint={"every": "100 steps", "keep": 9})
    prepare(config, tmp_path, 1)
    state = build(config, tmp_path)
    batches = iter(state.data)
    expected = {}
    with checkpoint.Saver(state, tmp_path) as saver:
        for _ in range(4):
            train_step(state, next(batches))
            expected[state.step] = {name: value.clone() for name, value in state.tensors().items()}
            saver.save()
    batches.close()  # type: ignore[attr-defined]
    there = written(tmp_path)
    assert list(there) == [1, 2, 3, 4]
    wrong = [(s, n) for s in expected for n, value in expected[s].items() if not torch.equal(there[s][n], value)]
    assert wrong == []


def test_averages_in_the_weights_place_are_not_written_as_weights(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 1 is saved, step 2 is dropped, so that no optimiser waits for the copy; then averages are measured."""
    copy, measured = DefaultStager._stage, together._measured
    averages_are_in, copied = threading.Event(), threading.Event()

    def late(self: DefaultStager, tensors: Any, **options: Any) -> Any:
        averages_are_in.wait(LATE_S)
        found = copy(self, tensors, **options)
        copied.set()
        return found

    def slow(*arguments: Any) -> dict[str, float]:
        averages_are_in.set()
        assert copied.wait(PATIENCE_S)
        return measured(*arguments)

    monkeypatch.setattr(DefaultStager, "_stage", late)
    monkeypatch.setattr(together, "_measured", slow)
    picture = {"key": "0", "png": drawing("red", "circle", 0), "cls": 0, "txt": "a red circle"}
    write_suite(str(tmp_path / "suite"), [picture], ("red", "blue"), ("a {c} circle",))
    config = make_config(
        length="2 steps",
        optim={"ema": 0.9, "on_bad_step": "skip", "spike": 3.0},
        checkpoint={"every": "1 steps", "keep": 9},
        evaluate={"suite": str(tmp_path / "suite"), "every": "2 steps"},
    )
    prepare(config, tmp_path / "run", 1)
    state = build(config, tmp_path / "run")

    def leap() -> bool:
        if state.step == 2:
            state.guard.mean_loss = 1e-6
        return False

    fit(state, tmp_path / "run", leap)
    assert averages_are_in.is_set()
    assert state.guard.dropped == 1
    # The dropped step changed nothing, so what was saved before it is what the run has now.
    there, now = written(tmp_path / "run"), state.tensors()
    assert list(there) == [1, 2]
    assert any(
        not torch.equal(now[f"model.{name}"], now[f"average.{name}"]) for name, _ in state.model.named_parameters()
    )
    wrong = [(step, name) for step in there for name, value in now.items() if not torch.equal(there[step][name], value)]
    assert wrong == []
