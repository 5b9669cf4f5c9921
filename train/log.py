"""The log lines of a run: what they say. `train/sinks/` has where they go."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.distributed.tensor import DTensor

from infra.logs import Meter, log
from train.clock import TrainingClock
from train.flops import FlopsBySize, peak_flops
from train.parallel import gather_states, mean_over_ranks, rank, world_size
from train.sinks import open_sinks
from train.state import TrainingState

SKIPPED_NAMED = 4
"""Samples of each rank that a warning about skipped ones names by number."""


class TrainingLog:
    """Writes a line every so many steps, with means over the steps since the last.

    Args:
        folder: the run's folder; lines of steps that are about to be repeated are taken out of its log.
        state: the run.
        meter: shows the newest numbers.

    Attributes:
        clock: tells training from measuring.
        shape: side of the pictures (pixels) and length of the texts (tokens) of the step that is taken in next.

    Raises:
        UserError: something that lines are to go to is not installed.
    """

    def __init__(self, folder: Path, state: TrainingState, meter: Meter) -> None:
        self.state, self.meter = state, meter
        self.every = state.steps_of(state.config.log.every)
        self.shape = (0, 0)
        self._sinks = open_sinks(state.config, folder, state.step) if rank() == 0 else []
        self._peak = peak_flops(state.device, state.dtype, state.config.log.peak_flops) if rank() == 0 else 0.0
        self.clock = TrainingClock()
        self._flops = FlopsBySize(state.config, state.data.tokenizer.vocabulary)
        self._begin()

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, *_: object) -> None:
        for sink in self._sinks:
            sink.close()

    def step(self, numbers: dict[str, float], pause_s: float = 0.0) -> None:
        """Take in one step's numbers (none for a dropped step); every rank must call it.

        Args:
            numbers: this rank's.
            pause_s: seconds that the loop has waited for checkpoints so far.
        """
        for name, value in numbers.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._steps += 1
        self._shapes[self.shape] += 1
        self._taken += bool(numbers)
        self.meter.advance(self.state.config.data.global_batch_size)
        if self.state.step % self.every == 0 or self.state.samples >= self.state.total:
            self._write(pause_s)
            self._begin()

    def note(self, numbers: dict[str, Any]) -> None:
        """Write a line of its own, for a measurement or a remark."""
        self._put({"step": self.state.step, "samples": self.state.samples, **numbers})

    def _begin(self) -> None:
        self._sums: dict[str, float] = {}
        self._steps = self._taken = 0
        self._shapes: Counter[tuple[int, int]] = Counter()
        self._waited_s = self.state.data.waited_s

    def _write(self, pause_s: float) -> None:
        state, seconds = self.state, self.clock.lap(pause_s)
        waiting = (state.data.waited_s - self._waited_s) / seconds
        own = [*(total / self._taken for total in self._sums.values()), waiting, len(state.data.skipped)]
        *means, waiting, skipped = mean_over_ranks(own)
        speed = self._steps * state.config.data.global_batch_size / seconds
        line = {
            "step": state.step,
            "samples": state.samples,
            "epoch": round(state.samples / state.data.epoch_samples, 3),
            **dict(zip(self._sums, means, strict=False)),
            "averaged_steps": self._taken,
            # Not 1 / exp: the scale of a run that diverges is 0, which the gradient's own check is to say.
            "temperature": state.model.logit_scale.neg().exp().item(),
            "learning_rate": state.optimizer.param_groups[0]["lr"],
            "parameter_norm": _parameter_norm(state),
            "samples_per_s": speed,
            "samples_per_s_device": speed / world_size(),
            **self._utilisation(speed / world_size()),
            "waiting_share": waiting,
            "checkpoint_pause_s": round(pause_s, 3),
            "evaluate_s": round(self.clock.evaluate_s, 3),
            "skipped": self._named_skipped(round(skipped * world_size())),
            "dropped_steps": state.guard.dropped,
            "memory_bytes": psutil.Process().memory_info().rss,
            "seconds": state.seconds,
        }
        if state.device.type == "cuda":
            line["device_memory_bytes"] = torch.cuda.max_memory_allocated(state.device)
        state.metrics = line
        self._put(line)
        shown = {"loss": "loss", "accuracy": "accuracy", "per_s": "samples_per_s"}
        self.meter.advance(0, **{short: line[name] for short, name in shown.items() if name in line})

    def _utilisation(self, speed: float) -> dict[str, float]:
        """Return `mfu` at so many samples a second of a device; nothing where its peak is not known."""
        if not self._peak or not all(self.shape):
            return {}
        needed = sum(steps * self._flops(*shape) for shape, steps in self._shapes.items())
        return {"mfu": speed * needed / self._steps / self._peak}

    def _named_skipped(self, total: int) -> int:
        """Name the first of so many samples that others stood in for on all ranks since the last line."""
        own = self.state.data.skipped
        if total:
            first = torch.tensor((own + [-1] * SKIPPED_NAMED)[:SKIPPED_NAMED])
            numbers = [number for each in gather_states(first) for number in each.tolist() if number >= 0]
            if rank() == 0:
                named = ", ".join(map(str, numbers)) + (", ..." if len(numbers) < total else "")
                log.warning("train: up to step %d, %d samples could not be used: %s", self.state.step, total, named)
        own.clear()
        return total

    def _put(self, line: dict[str, Any]) -> None:
        for sink in self._sinks:
            sink.write(line)


def _parameter_norm(state: TrainingState) -> float:
    """Return the norm of all parameters; every rank must call it, since each may hold a shard."""
    every = [parameter.detach() for parameter in state.model.parameters()]
    shards = [one for one in every if isinstance(one, DTensor)]
    whole = [one for one in every if not isinstance(one, DTensor)]
    norms = [torch.nn.utils.get_total_norm(some) for some in (shards, whole) if some]
    return math.hypot(*(float(norm.full_tensor() if isinstance(norm, DTensor) else norm) for norm in norms))
