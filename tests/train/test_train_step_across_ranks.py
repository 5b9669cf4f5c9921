"""Steps of the loop over two ranks leave on each the weights and running statistics of one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from infra.config import parse
from infra.storage import Folder
from tests.train.forked import become_ranks, run_ranks
from train.config import RunConfig
from train.launch import prepare
from train.loop import train_step
from train.state import build

STEPS, PATIENCE_S = 3, 120


def trained(run: str) -> dict[str, Tensor]:
    """Take this rank's part of the first steps of a prepared run; return weights, statistics and averages."""
    state = build(parse(Folder(run).read_json("config.json"), RunConfig, source=run), run)
    batches = iter(state.data)
    for _ in range(STEPS):
        assert train_step(state, next(batches))
    batches.close()  # type: ignore[attr-defined]
    return {name: value for name, value in state.tensors().items() if not name.startswith("optimizer.")}


def test_two_ranks_leave_what_one_process_does(tmp_path: Path, make_config: Callable[..., RunConfig]) -> None:
    """Batch normalisation over groups of four, of which each rank has others than the other."""
    config = make_config(
        data={"image_size": 32},
        model={"name": "RN-nano", "statistics_group": 4},
        optim={"epsilon": 1e-3, "warmup": "0 steps"},  # AdamW's first steps are signs, but for a large epsilon
    )
    prepare(config, tmp_path / "run", 2)
    run_ranks(__file__, 2, str(tmp_path / "run"), PATIENCE_S)
    expected = trained(str(tmp_path / "run"))
    assert any("running_mean" in name for name in expected)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"run-{rank}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        off = {name: float((found[name] - value).abs().max()) for name, value in expected.items()}
        assert {name: distance for name, distance in off.items() if distance > 1e-4} == {}


def leave(run: str) -> None:
    """Leave beside the run what this rank has."""
    torch.set_num_threads(1)
    torch.save(trained(run), f"{run}-{dist.get_rank()}.pt")


if __name__ == "__main__":
    become_ranks(leave)
