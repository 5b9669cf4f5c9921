"""RUN/log.jsonl: one JSON object a log line, continued without a gap or an overlap after an interruption."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import psutil

from infra.logs import Meter
from train.parallel import mean_over_ranks, rank
from train.state import TrainingState

LOG_NAME = "log.jsonl"


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
            self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
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
        """Write a line of its own, for a measurement (rank 0 alone calls it)."""
        self._append({"step": self.state.step, "samples": self.state.samples, **numbers})

    def _write(self) -> None:
        seconds = time.monotonic() - self._started
        waiting = (self.state.data.waited_s - self._waited_s) / max(seconds, 1e-9)
        means = mean_over_ranks([*(total / self._steps for total in self._sums.values()), waiting])
        line = {
            "step": self.state.step,
            "samples": self.state.samples,
            "epoch": round(self.state.samples / self.state.data.epoch_samples, 3),
            **dict(zip(self._sums, means, strict=False)),
            "temperature": 1 / self.state.model.logit_scale.exp().item(),
            "learning_rate": self.state.optimizer.param_groups[0]["lr"],
            "samples_per_s": self._steps * self.state.config.data.global_batch_size / max(seconds, 1e-9),
            "waiting_share": means[-1],
            "memory_bytes": psutil.Process().memory_info().rss,
            "seconds": self.state.seconds,
        }
        self.last = line
        if rank() == 0:
            self._append(line)
            self.meter.advance(0, loss=line["loss"], accuracy=line["accuracy"], per_s=line["samples_per_s"])
        self._sums, self._steps = {}, 0
        self._started, self._waited_s = time.monotonic(), self.state.data.waited_s

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as stream:
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
