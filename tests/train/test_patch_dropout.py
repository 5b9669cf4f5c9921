"""Patches left out in training are each sample's own draws: the same at any world size, micro batch and resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from train import checkpoint
from train.config import RunConfig
from train.launch import prepare, train
from train.loop import fit, resumed, train_step
from train.state import build
from train.towers.vit import kept_patches

MakeConfig = Callable[..., RunConfig]
MODEL = {
    "patch_dropout": 0.5,
    "vision": {},
    "vit": {"image_size": 16, "patch_size": 4, "width": 16, "layers": 1, "heads": 2},
}


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


def weights(run: Path) -> dict[str, torch.Tensor]:
    state = checkpoint.load_newest(run / "checkpoints")
    assert state is not None
    return dict(state["model"])


def test_two_ranks_one_and_a_resume_in_mid_epoch_are_one_run(tmp_path: Path, make_config: MakeConfig) -> None:
    """The run of two processes, taken up again after step 4 of 6 in an epoch by one, is the run of one."""
    config = make_config(length="8 steps", model=MODEL, optim={"learning_rate": 1e-2})
    alone, both = tmp_path / "alone", tmp_path / "both"
    prepare(config, alone, 1)
    fit(build(config, alone), alone, lambda: False)
    train(config, both, 2)
    assert losses(both) == pytest.approx(losses(alone), abs=1e-4)
    for name, value in weights(alone).items():
        torch.testing.assert_close(weights(both)[name], value, rtol=0, atol=1e-4)
    shutil.rmtree(both / "checkpoints" / "step-00000008")
    fit(resumed(build(config, both), both), both, lambda: False)
    assert losses(both) == pytest.approx(losses(alone), abs=1e-4)


def test_micro_batches_leave_out_the_same(tmp_path: Path, make_config: MakeConfig) -> None:
    found = []
    for size in (0, 6):
        config, run = make_config(model=MODEL, parallel={"micro_batch": size}), tmp_path / str(size)
        prepare(config, run, 1)
        state = build(config, run)
        batches = iter(state.data)
        found.append(train_step(state, next(batches)))
        batches.close()  # type: ignore[attr-defined]
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_a_samples_patches_do_not_depend_on_its_batch() -> None:
    draws = torch.rand(6, 9, generator=torch.Generator().manual_seed(0))
    draws[:, 3] = draws[:, 5]  # equal numbers have an order too
    together = kept_patches(draws, 0.5)
    assert torch.equal(together, torch.cat([kept_patches(one[None], 0.5) for one in draws]))
    assert together.shape == (6, 4)
    assert kept_patches(draws, 0.99).shape == (6, 1)
