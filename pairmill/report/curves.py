"""The training run's log as curves."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from infra.storage import Folder
from pairmill.report import charts
from pairmill.report.accounting import KEPT
from pairmill.report.charts import Chart, Points, Say
from pairmill.report.wording import number, percent, size

LOG = "log.jsonl"
SECOND = "second"
"""Tone of a chart's second line."""

_FIGURES: tuple[tuple[str, str, Say, bool], ...] = (
    ("samples_per_s", "Samples per second", number, True),
    ("learning_rate", "Learning rate", number, True),
    ("temperature", "Temperature", number, False),
    ("gradient_norm", "Gradient norm", number, True),
    ("waiting_share", "Time spent waiting for data", percent, True),
    ("memory_bytes", "Memory of a process", size, True),
)


def log_lines(run: Folder) -> list[dict[str, Any]]:
    """Return the lines of a run's log; one that is not whole ends it, as a killed process leaves it."""
    if not run.exists(LOG):
        return []
    found: list[dict[str, Any]] = []
    with run.open(LOG) as stream:
        for raw in stream:
            try:
                line = json.loads(raw)
            except ValueError:
                break
            if isinstance(line, dict) and _is_number(line.get("samples")):
                found.append(line)
    return found


def curves(lines: list[dict[str, Any]]) -> tuple[list[Chart], list[Chart]]:
    """Return the large charts, loss, accuracy and recalls, and the small ones; those without a figure are left out."""
    accuracy = [
        ("in batch", KEPT, _points(lines, "accuracy")),
        ("zero-shot", SECOND, _points(lines, "zero_shot")),
    ]
    recalls = [
        ("image to text", KEPT, _points(lines, "image_to_text_recall@1")),
        ("text to image", SECOND, _points(lines, "text_to_image_recall@1")),
    ]
    large = (
        charts.lines("Loss", [("loss", KEPT, _points(lines, "loss"))], number, _count, "samples", from_zero=False),
        charts.lines("Accuracy" if accuracy[1][2] else "Accuracy in the batch", accuracy, percent, _count, "samples"),
        charts.lines("Recall at 1", recalls, percent, _count, "samples"),
    )
    small = (
        charts.lines(title, [(title, KEPT, _points(lines, name))], say, _count, "samples", from_zero=from_zero)
        for name, title, say, from_zero in _FIGURES
    )
    return _there(large), _there(small)


def _points(lines: list[dict[str, Any]], name: str) -> Points:
    return [(float(line["samples"]), float(line[name])) for line in lines if _is_number(line.get(name))]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _there(found: Iterable[Chart | None]) -> list[Chart]:
    return [chart for chart in found if chart is not None]


def _count(value: float) -> str:
    """Return a number of samples, short enough for an axis."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.0f}"
