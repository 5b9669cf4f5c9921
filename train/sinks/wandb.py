"""Weights & Biases: a run's lines under one name over all interruptions; offline with WANDB_MODE=offline."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infra.errors import UserError
from train.config import RunConfig


class WeightsAndBiases:
    """Sends lines to Weights & Biases, or keeps them in RUN/wandb.

    Args:
        config: the run; `log.project` is the project's name.
        run: its folder, whose place names the run there.

    Raises:
        UserError: wandb is not installed.
    """

    def __init__(self, config: RunConfig, run: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError("log.to: wandb is not installed; pip install 'pairmill[wandb]'") from None
        name = hashlib.sha256(str(run.absolute()).encode()).hexdigest()[:16]
        self._run = wandb.init(
            project=config.log.project,
            name=run.name,
            id=name,
            resume="allow",
            dir=str(run),
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def write(self, line: Mapping[str, Any]) -> None:
        """Send a line's numbers."""
        self._run.log({name: value for name, value in line.items() if isinstance(value, int | float)}, line["step"])

    def close(self) -> None:
        """Wait until all is sent or kept."""
        self._run.finish()
