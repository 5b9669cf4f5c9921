"""Where log lines go besides the terminal: one file a place; `log.jsonl` always, the others by `log.to`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from train.config import RunConfig
from train.sinks.jsonl import JsonLines


class Sink(Protocol):
    """Takes log lines, in order; only rank 0 has any."""

    def write(self, line: Mapping[str, Any]) -> None:
        """Take one line; it has `step` and `samples`."""

    def close(self) -> None:
        """Finish what was begun."""


def open_sinks(config: RunConfig, run: Path, step: int) -> list[Sink]:
    """Open what a run's lines are written to, `log.jsonl` first.

    Args:
        config: the run.
        run: its folder.
        step: lines of later steps are taken out: these steps are about to be taken again.

    Raises:
        UserError: a package that one of them needs is missing.
    """
    found: list[Sink] = [JsonLines(run, step)]
    if "tensorboard" in config.log.to:
        from train.sinks.tensorboard import TensorBoard

        found.append(TensorBoard(run, step))
    if "wandb" in config.log.to:
        from train.sinks.wandb import WeightsAndBiases

        found.append(WeightsAndBiases(config, run))
    if "prometheus" in config.log.to:
        from train.sinks.prometheus import Prometheus

        found.append(Prometheus(config.log.prometheus_port))
    return found
