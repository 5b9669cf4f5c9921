"""A checkpoint on its way when a bad step ends the run: it was copied before, and it is kept."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import torch
import torch.distributed as dist
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from infra.config import parse
from infra.storage import Folder
from tests.train.forked import become_ranks, run_ranks
from train import checkpoint
from train.bad_steps import BadStepError
from train.config import RunConfig
from train.launch import prepare
from train.loop import fit
from train.state import build

WRITE_S, PATIENCE_S = 1.5, 120


class FarAway(DirFileSystem):
    """A disk to which everything takes its time."""

    protocol = "faraway"

    def __init__(self, **options: Any) -> None:
        super().__init__("/", LocalFileSystem(auto_mkdir=True), **options)

    def open(self, path: str, mode: str = "rb", *args: Any, **options: Any) -> Any:
        """Open a file, later if it is to be written."""
        time.sleep(WRITE_S if "w" in mode else 0)
        return super().open(path, mode, *args, **options)


fsspec.register_implementation("faraway", FarAway, clobber=True)


def test_it_is_there_when_the_run_has_ended(tmp_path: Path, make_config: Callable[..., RunConfig]) -> None:
    """Two ranks; the loss of step 3 is a leap, while the checkpoint of step 2 is being written."""
    folder = f"faraway://{tmp_path}/checkpoints"
    config = make_config(optim={"spike": 3.0}, checkpoint={"every": "2 steps", "folder": folder}, length="8 steps")
    prepare(config, tmp_path / "run", 2)
    run_ranks(__file__, 2, str(tmp_path / "run"), PATIENCE_S)
    for rank in (0, 1):
        ended = json.loads((tmp_path / f"run-{rank}.json").read_text())
        assert ended["saved"] == [2]
        assert "times its running mean" in ended["error"]
    assert checkpoint.load(f"{tmp_path}/checkpoints/step-00000002")["step"] == 2


def end_badly(run: str) -> None:
    """Train until the bad step, and leave beside the run which checkpoints were there then."""
    torch.set_num_threads(1)
    config = parse(Folder(run).read_json("config.json"), RunConfig, source=run)
    state = build(config, run)

    def leap() -> bool:
        if state.step == 3:
            state.guard.mean_loss = 1e-6
        return False

    error = ""
    try:
        fit(state, Path(run), leap)
    except BadStepError as found:
        error = str(found)
    there = [one.step for one in checkpoint.saved(config.checkpoint.folder)]
    Path(f"{run}-{dist.get_rank()}.json").write_text(json.dumps({"error": error, "saved": there}))


if __name__ == "__main__":
    become_ranks(end_badly)
