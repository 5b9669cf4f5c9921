"""What a step waits for: the device once, and the other ranks in one message beside the gradients."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from infra.config import parse
from infra.storage import Folder
from tests.train.forked import become_ranks, run_ranks
from train.collectives import Vote
from train.config import RunConfig
from train.launch import prepare
from train.loop import fit, train_step
from train.state import build

MakeConfig = Callable[..., RunConfig]
STEPS, PATIENCE_S = 6, 120
VIT = {"vision": {}, "vit": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "heads": 2}}


class Scalars(TorchDispatchMode):
    """Counts how often a single number is asked of a tensor."""

    asked = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, and do what was asked for."""
        self.asked += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_step_asks_for_no_number_by_itself(tmp_path: Path, make_config: MakeConfig) -> None:
    """Loss, accuracy and norm come together; they are those that the tensors held."""
    config = make_config(model=VIT, objective={"tile": 4}, optim={"spike": 100.0})
    prepare(config, tmp_path, 1)
    state = build(config, tmp_path)
    batches = iter(state.data)
    batch = next(batches)
    with Scalars() as counted:
        numbers = train_step(state, batch)
    batches.close()  # type: ignore[attr-defined]
    assert counted.asked == 0
    assert list(numbers) == ["loss", "accuracy", "gradient_norm"]
    assert all(value == torch.tensor(value).item() for value in numbers.values())  # as float32 has them


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no accelerator")
def test_a_step_waits_for_a_card_once(tmp_path: Path, make_config: MakeConfig) -> None:
    """Batches are there already, copied from pinned memory while the one before was computed on."""
    augment = {"flip": 0.5, "rotation_degrees": 10, "hue_degrees": 10, "blur": 0.5, "erase": 0.5}
    config = make_config(model=VIT, augment=augment, optim={"spike": 100.0})
    prepare(config, tmp_path, 1)
    state = build(config, tmp_path)
    batches = iter(state.data)
    train_step(state, next(batches))
    batch = next(batches)
    assert {batch.images.device.type, batch.tokens.device.type, batch.numbers.device.type} == {"cuda"}
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train_step(state, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        batches.close()  # type: ignore[attr-defined]
    assert len([one for one in caught if "synchronizing" in str(one.message)]) == 1


@pytest.mark.parametrize("answers", [(False, False), (True, False), (False, True)])
def test_a_vote_of_one(answers: tuple[bool, bool]) -> None:
    vote = Vote(lambda: answers[0], lambda: answers[1])
    assert vote.answers == (False, False)
    assert vote.take(2.5) == 2.5
    assert vote.answers == answers


def test_a_step_of_two_ranks_is_one_message(tmp_path: Path, make_config: MakeConfig) -> None:
    """The mean loss, for a spike, and who wants to stop or to save; one more for the log's only line."""
    config = make_config(
        length=f"{STEPS} steps",
        model=VIT,
        optim={"spike": 100.0, "on_bad_step": "skip", "ema": 0.0},
        log={"every": "100 steps"},
        checkpoint={"every": "100 steps"},
    )
    prepare(config, tmp_path / "run", 2)
    run_ranks(__file__, 2, str(tmp_path / "run"), PATIENCE_S)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"run-{rank}.json").read_text())
        # Rank 1 alone asks to stop; both do, after the step in which it was asked.
        assert found == {"messages": STEPS - 1, "step": STEPS - 1}


def count(run: str) -> None:
    """Train and leave beside the run how many sums over the ranks were asked for."""
    summed, asked = dist.all_reduce, []

    def counted(*args: Any, **options: Any) -> Any:
        asked.append(args)
        return summed(*args, **options)

    torch.set_num_threads(1)
    config = parse(Folder(run).read_json("config.json"), RunConfig, source=run)
    state = build(config, run)
    dist.all_reduce = counted
    fit(state, Path(run), lambda: dist.get_rank() == 1 and state.step == STEPS - 1)
    dist.all_reduce = summed
    found = {"messages": len(asked), "step": state.step}
    Path(f"{run}-{dist.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    become_ranks(count)
