"""RUN/tensorboard: every number of a log line as a scalar, for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infra.errors import UserError

TENSORBOARD_NAME = "tensorboard"


class TensorBoard:
    """Writes event files.

    Args:
        run: the run's folder.
        step: what was written of later steps is no longer shown.

    Raises:
        UserError: tensorboard is not installed.
    """

    def __init__(self, run: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("log.to: tensorboard is not installed; pip install 'pairmill[tensorboard]'") from None
        self._writer = SummaryWriter(str(run / TENSORBOARD_NAME), purge_step=step + 1)

    def write(self, line: Mapping[str, Any]) -> None:
        """Write each number under its name, at the line's step."""
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, line["step"])
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
