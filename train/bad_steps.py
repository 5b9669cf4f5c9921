"""Steps whose gradient is not finite or whose loss leaps: they end the run or are dropped, and are written down."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from infra.errors import RunError
from infra.storage import full_disk_is_named
from train.optim import OptimConfig
from train.parallel import rank, world_size
from train.sinks.jsonl import cut

BAD_STEPS_NAME = "bad-steps.jsonl"
WINDOW = 100
"""Steps that the running mean of the loss goes back."""
NAMED_KEYS = 8
"""Keys of a batch that a message names; the file has them all."""


class BadStepError(RunError):
    """A bad step that ends the run: raised on every rank, after the same step."""


class StepGuard:
    """Judges every step before the optimiser takes it.

    Args:
        config: what is a bad step, and what becomes of it.
        folder: the run's, for `bad-steps.jsonl`.
    """

    def __init__(self, config: OptimConfig, folder: Path) -> None:
        self.config, self.path = config, folder / BAD_STEPS_NAME
        self.dropped = self.in_a_row = self.seen = 0
        self.mean_loss = 0.0
        self._buffers: list[tuple[Tensor, Tensor]] = []

    def take_back(self, steps: int) -> None:
        """Take out of the record what is known of bad steps after so many, which are about to be taken again."""
        if rank() == 0 and self.path.exists():
            cut(self.path.parent, self.path.name, steps - 1)  # a line's step is the number of those before it

    def begin(self, model: nn.Module) -> None:
        """Keep what the forward pass changes and a dropped step must not."""
        if self.config.on_bad_step == "skip":
            self._buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def fault(self, loss: float, norm: float) -> str:
        """Return what is wrong with a step, the same on every rank; an empty string if nothing is.

        Args:
            loss: mean over the ranks.
            norm: of the gradient, the same on all ranks.
        """
        if not math.isfinite(norm):
            return "the gradient is not finite"
        if not self.config.spike:
            return ""
        if not math.isfinite(loss):
            return "the loss is not finite"
        if self.seen and loss > self.config.spike * self.mean_loss:
            return f"the loss, {loss:.4g}, is {loss / self.mean_loss:.4g} times its running mean"
        self.seen += 1
        self.mean_loss += (loss - self.mean_loss) / min(self.seen, WINDOW)
        return ""

    def accept(self) -> None:
        """Note that a step was taken."""
        self.in_a_row = 0

    def drop(self, fault: str, step: int, loss: float, norm: float, keys: Sequence[str]) -> None:
        """Write a step down and undo what its forward pass changed; every rank must call it.

        Raises:
            BadStepError: bad steps end the run, or there have been too many in a row.
        """
        line = {"step": step, "rank": rank(), "fault": fault, "loss": _plain(loss), "gradient_norm": _plain(norm)}
        self._write([*_of_all_ranks({**line, "keys": list(keys)})])
        self.dropped, self.in_a_row = self.dropped + 1, self.in_a_row + 1
        where = f"step {step}: {fault} (loss {loss}); samples on rank {rank()}: {', '.join(keys[:NAMED_KEYS])}, ..."
        advice = (
            f"all are in {self.path}; look at them, go on with optim.on_bad_step = 'skip' or a lower optim.clip_norm, "
            "or a lower optim.learning_rate (--set optim.learning_rate=... --changed-config)"
        )
        if self.config.on_bad_step == "stop":
            raise BadStepError(f"{where}; {advice}")
        if self.in_a_row >= self.config.max_bad_steps:
            raise BadStepError(
                f"{where}; the last {self.in_a_row} steps were all dropped (optim.max_bad_steps); {advice}"
            )
        for buffer, before in self._buffers:
            buffer.copy_(before)

    def state_dict(self) -> dict[str, Any]:
        """Return counts and the running mean."""
        return {"dropped": self.dropped, "in_a_row": self.in_a_row, "seen": self.seen, "mean_loss": self.mean_loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.dropped, self.in_a_row = state["dropped"], state["in_a_row"]
        self.seen, self.mean_loss = state["seen"], state["mean_loss"]

    def _write(self, found: list[dict[str, Any]]) -> None:
        if rank() == 0:
            with full_disk_is_named(str(self.path)), self.path.open("a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(line) + "\n" for line in found)


def _of_all_ranks(line: dict[str, Any]) -> list[dict[str, Any]]:
    if world_size() == 1:
        return [line]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, line)
    return found


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON has no NaN
