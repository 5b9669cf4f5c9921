"""RUN/log.jsonl: one JSON object a log line, continued without a gap or an overlap after an interruption."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from infra.logs import Meter, log
from infra.storage import Folder, full_disk_is_named
from train.parallel import gather_states, mean_over_ranks, rank, world_size
from train.state import TrainingState

LOG_NAME = "log.jsonl"
SKIPPED_NAMED = 4
"""Samples of each rank that a warning about skipped ones names by number."""


class TrainingLog:
    """Writes a line every so many steps, with means over the steps since the last.

    Args:
        folder: the run's folder; lines of steps that are about to be repeated are taken out of its log.
        state: the run.
        meter: shows the newest numbers.
    """

    def __init__(self, folder: Path, state: TrainingState, meter: Meter) -> None:
        self.path, self.state, self.meter = folder / LOG_NAME, state, meter
        self.every = state.steps_of(state.config.log.every)
        self.last: dict[str, Any] = {}
        self._sums: dict[str, float] = {}
        self._steps = 0
        self._started, self._waited_s = time.monotonic(), state.data.waited_s
        if rank() == 0:
            kept = [line for line in lines(self.path) if line["step"] <= state.step]
            Folder(folder).write(LOG_NAME, "".join(json.dumps(line) + "\n" for line in kept).encode())
            self.last = kept[-1] if kept else {}

    def step(self, numbers: dict[str, float]) -> None:
        """Take in one step's numbers; every rank must call it."""
        for name, value in numbers.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._steps += 1
        self.meter.advance(self.state.config.data.global_batch_size)
        if self.state.step % self.every == 0 or self.state.samples >= self.state.total:
            self._write()

    def note(self, numbers: dict[str, Any]) -> None:
        """Write a line of its own, for a measurement."""
        if rank() == 0:
            self._append({"step": self.state.step, "samples": self.state.samples, **numbers})

    def _write(self) -> None:
        seconds = time.monotonic() - self._started
        waiting = (self.state.data.waited_s - self._waited_s) / max(seconds, 1e-9)
        skipped = self._skipped()
        means = mean_over_ranks([*(total / self._steps for total in self._sums.values()), waiting])
        line = {
            "step": self.state.step,
            "samples": self.state.samples,
            "epoch": round(self.state.samples / self.state.data.epoch_samples, 3),
            **dict(zip(self._sums, means, strict=False)),
            # Not 1 / exp: the scale of a run that diverges is 0, which the gradient's own check is to say.
            "temperature": self.state.model.logit_scale.neg().exp().item(),
            "learning_rate": self.state.optimizer.param_groups[0]["lr"],
            "samples_per_s": self._steps * self.state.config.data.global_batch_size / max(seconds, 1e-9),
            "waiting_share": means[-1],
            "skipped": skipped,
            "memory_bytes": psutil.Process().memory_info().rss,
            "seconds": self.state.seconds,
        }
        self.last = line
        if rank() == 0:
            self._append(line)
            self.meter.advance(0, loss=line["loss"], accuracy=line["accuracy"], per_s=line["samples_per_s"])
        self._sums, self._steps = {}, 0
        self._started, self._waited_s = time.monotonic(), self.state.data.waited_s

    def _skipped(self) -> int:
        """Return how many samples of all ranks others stood in for since the last line; rank 0 names the first."""
        own = self.state.data.skipped
        total = round(mean_over_ranks([len(own)])[0] * world_size())
        if total:
            first = torch.tensor((own + [-1] * SKIPPED_NAMED)[:SKIPPED_NAMED])
            numbers = [number for each in gather_states(first) for number in each.tolist() if number >= 0]
            if rank() == 0:
                named = ", ".join(map(str, numbers)) + (", ..." if len(numbers) < total else "")
                log.warning("train: up to step %d, %d samples could not be used: %s", self.state.step, total, named)
        own.clear()
        return total

    def _append(self, line: dict[str, Any]) -> None:
        with full_disk_is_named(str(self.path)), self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


def lines(path: Path) -> list[dict[str, Any]]:
    """Return a log's lines; one that a killed process left unfinished is dropped."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found
