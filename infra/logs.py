"""Logs and progress, always on standard error: standard output belongs to results."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

log = logging.getLogger("pairmill")
console = Console(stderr=True)
LINE_EVERY_S = 60.0
"""Seconds between progress lines where there is no terminal."""


def setup(level: str = "INFO") -> None:
    """Send Pairmill's log to standard error: coloured on a terminal, plain lines elsewhere."""
    handler: logging.Handler
    if sys.stderr.isatty():
        handler = RichHandler(console=console, show_path=False, log_time_format="%H:%M:%S")
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    log.handlers[:] = [handler]
    log.setLevel(level)
    log.propagate = False


class Meter:
    """Counts a stage's units; the shown line carries the newest value of every field."""

    def __init__(self, title: str, total: int | None, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = 0
        self.fields: dict[str, Any] = {}
        self._bar: Progress | None = None
        self._task: Any = None
        self._next_line = time.monotonic() + LINE_EVERY_S

    def advance(self, units: int = 1, **fields: Any) -> None:
        """Add `units` done and show `fields` (name to value) beside the count."""
        self.done += units
        self.fields.update(fields)
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, detail=self._detail())
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_EVERY_S
            log.info("%s: %s", self.title, self.summary())

    def summary(self) -> str:
        """Return `12/40 shards  rows=120000`."""
        of = f"/{self.total:,}" if self.total is not None else ""
        return f"{self.done:,}{of} {self.unit}  {self._detail()}".rstrip()

    def _detail(self) -> str:
        return "  ".join(f"{name}={_short(value)}" for name, value in self.fields.items())


@contextmanager
def progress(title: str, total: int | None, unit: str) -> Iterator[Meter]:
    """Show the progress of `total` units: a bar on a terminal, elsewhere a line a minute; one at the end."""
    meter = Meter(title, total, unit)
    started = time.monotonic()
    if console.is_terminal:
        columns = (
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
            TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[detail]}"),
        )  # fmt: skip
        with Progress(*columns, console=console, transient=True) as bar:
            meter._bar, meter._task = bar, bar.add_task(title, total=total, detail="")
            yield meter
    else:
        log.info("%s: started%s", title, f", {total:,} {unit}" if total is not None else "")
        yield meter
    log.info("%s: %s  in %.1f s", title, meter.summary(), time.monotonic() - started)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
