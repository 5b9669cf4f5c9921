"""Prometheus: the newest log line, under the names of `infra.metrics`, served by rank 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infra.metrics import TrainingGauges


class Prometheus:
    """Serves the newest line on a port of this machine.

    Args:
        port: of http://HOST:PORT/metrics.

    Raises:
        UserError: the port is taken.
    """

    def __init__(self, port: int) -> None:
        self._gauges = TrainingGauges(port)

    def write(self, line: Mapping[str, Any]) -> None:
        """Show a line's numbers until the next."""
        self._gauges.set({name: float(value) for name, value in line.items() if isinstance(value, int | float)})

    def close(self) -> None:
        """Stop serving."""
        self._gauges.close()
