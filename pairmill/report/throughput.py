"""Rows and bytes a second over ingest, from when each row was done, or from the shards' spans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from infra.errors import RunError
from infra.storage import Folder
from pairmill.report import charts
from pairmill.report.accounting import KEPT
from pairmill.report.charts import Chart
from pairmill.report.rows import Source, even
from pairmill.report.wording import duration, number, size
from shards.layout import RAW, STATS_SUFFIX, Status
from shards.writer import committed

SHARDS_BY_ROW = 64
"""Up to so many shards, every row is placed by its own time; beyond, by its shard's span."""
SPANS = 2_000
"""Shards whose spans are read at most; their rows stand for those of the others."""
STEPS = 72
PAUSE_S, PAUSE_BETWEEN_SPANS_S = 5.0, 3600.0
"""When no shard was in hand for so long, ingest was not running: the pause is cut out and marked. The second
is for where not every shard was looked at."""
TIME_TICKS, MARKS = 5, 6

_STATUSES = (
    (Status.SUCCESS.value, KEPT), (Status.FILTERED.value, Status.FILTERED.value),
    (Status.FAILED_TO_RESIZE.value, Status.FAILED_TO_RESIZE.value),
    (Status.FAILED_TO_DOWNLOAD.value, Status.FAILED_TO_DOWNLOAD.value),
)  # fmt: skip
_WIDTHS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400)
_PARTS_OF_A_SPAN = 40
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Done:
    """Rows as they were done: times in seconds since 1970, number in `_STATUSES`, how many rows and bytes."""

    times: Floats
    status: npt.NDArray[np.int64]
    rows: Floats
    bytes: Floats


@dataclass(frozen=True)
class Throughput:
    """The charts, and in words what they are drawn from."""

    charts: tuple[Chart, ...] = ()
    source: str = ""


def throughput(corpus: Folder, sources: list[Source]) -> Throughput:
    """Return rows a second by status and bytes a second over ingest; nothing before its first commit."""
    source = Source(corpus / RAW)
    shards = committed(source.folder)
    if not shards:
        return Throughput()
    sources.append(source)
    commits = [commit for name in even(shards, SPANS) if (commit := _commit(source, name)) is not None]
    if len(shards) <= SHARDS_BY_ROW:
        done, untimed = _by_row(source, shards)
        said = f"each row counts when it was done; {untimed:,} needed no request" if untimed else ""
    else:
        done = _by_span(commits, len(shards))
        said = f"estimated from the spans of {len(commits):,} of {len(shards):,} shards"
    if not len(done.times):
        return Throughput()
    spans = [(float(commit["start_time"]), float(commit["end_time"])) for commit in commits]
    return Throughput(_charts(done, spans, PAUSE_S if len(commits) == len(shards) else PAUSE_BETWEEN_SPANS_S), said)


def _by_row(source: Source, shards: Sequence[str]) -> tuple[_Done, int]:
    tables = []
    for shard in shards:
        tables += list(source.tables(f"{shard}.parquet", ("fetched_at", "status", "bytes")))
    tables = [table for table in tables if "fetched_at" in table.column_names]
    if not tables:
        return _nothing(), 0
    table = pa.concat_tables([one.select(["fetched_at", "status", "bytes"]) for one in tables])
    timed = table.filter(pc.is_valid(table["fetched_at"]))
    times = timed["fetched_at"].cast(pa.timestamp("ms")).cast(pa.int64()).to_numpy() / 1000
    names = pa.array([name for name, _ in _STATUSES])
    status = pc.fill_null(pc.index_in(timed["status"], names), len(_STATUSES) - 1).to_numpy().astype(np.int64)
    done = _Done(times, status, np.ones(len(times)), pc.fill_null(timed["bytes"], 0).to_numpy().astype(np.float64))
    return done, table.num_rows - timed.num_rows


def _by_span(commits: Sequence[dict[str, Any]], shards: int) -> _Done:
    """Spread each shard's rows evenly over its span; those looked at stand for all `shards`."""
    pieces: list[tuple[float, int, float, float]] = []
    share = shards / max(1, len(commits)) / _PARTS_OF_A_SPAN
    for commit in commits:
        for time in np.linspace(commit["start_time"], commit["end_time"], _PARTS_OF_A_SPAN):
            for at, (name, _) in enumerate(_STATUSES):
                rows = commit["by_status"].get(name, 0)
                pieces.append((float(time), at, rows * share, commit.get("bytes", 0) * share if at == 0 else 0.0))
    if not pieces:
        return _nothing()
    columns = np.array(pieces)
    return _Done(columns[:, 0], columns[:, 1].astype(np.int64), columns[:, 2], columns[:, 3])


def _commit(source: Source, shard: str) -> dict[str, Any] | None:
    try:
        commit: dict[str, Any] = source.folder.read_json(f"{shard}{STATS_SUFFIX}")
    except (OSError, RunError):
        source.unreadable.append(source.folder.path(f"{shard}{STATS_SUFFIX}"))
        return None
    return commit if {"start_time", "end_time", "by_status"} <= commit.keys() else None


def _nothing() -> _Done:
    empty = np.empty(0)
    return _Done(empty, np.empty(0, np.int64), empty, empty)


def _without_pauses(
    times: Floats, spans: Sequence[tuple[float, float]], pause_s: float
) -> tuple[Floats, list[tuple[float, str]]]:
    """Return seconds of work since the start, and where pauses were cut out, with how long each was."""
    stretches: list[list[float]] = []
    for start, end in sorted([*spans, (float(times.min()), float(times.min()))]):
        if stretches and start - stretches[-1][1] <= pause_s:
            stretches[-1][1] = max(stretches[-1][1], end)
        else:
            stretches.append([start, end])
    starts, ends = np.array(stretches).T
    before = np.concatenate([[0.0], np.cumsum(ends - starts)])
    at = np.maximum(np.searchsorted(starts, times, side="right") - 1, 0)
    worked = before[at] + np.minimum(times, ends[at]) - starts[at]
    gaps = zip(before[1:-1], starts[1:] - ends[:-1], strict=True)
    marks = [(float(place), f"paused {duration(float(gap))}") for place, gap in gaps]
    return worked, sorted(marks)[:MARKS]


def _charts(done: _Done, spans: Sequence[tuple[float, float]], pause_s: float) -> tuple[Chart, ...]:
    seconds, marks = _without_pauses(done.times, spans, pause_s)
    total = max(1.0, float(seconds.max()))
    edges = _edges(total)
    widths = np.diff(edges)
    rows = [
        (name.replace("_", " "), tone, _rate(seconds, done.rows * (done.status == at), edges, widths))
        for at, (name, tone) in enumerate(_STATUSES)
    ]
    wire = [("", KEPT, _rate(seconds, done.bytes, edges, widths))]
    mean_rows, mean_bytes = float(done.rows.sum()) / total, float(done.bytes.sum()) / total
    labelled = [float(x) for x in np.arange(0.0, total * 1.0001, _width(total, TIME_TICKS))]
    made = (
        charts.stacked(
            "Rows per second", edges.tolist(), rows, number, duration, labelled,
            latest=f"mean {mean_rows:,.0f}", marks=marks,
        ),
        charts.stacked(
            "Received per second", edges.tolist(), wire, size, duration, labelled,
            latest=f"mean {size(mean_bytes)}", marks=marks,
        ),
    )  # fmt: skip
    return tuple(chart for chart in made if chart is not None)


def _edges(total: float) -> Floats:
    """Return where steps begin and the last ends: a round width, the last step at least half of it."""
    width = _width(total, STEPS)
    edges = np.append(np.arange(0.0, total, width), total)
    if len(edges) > 2 and edges[-1] - edges[-2] < width / 2:
        edges = np.delete(edges, -2)
    return edges


def _width(total: float, most: int) -> float:
    """Return the least round width, in seconds, of which at most `most` cover `total`."""
    return next((float(wide) for wide in _WIDTHS_S if total / wide <= most), total / most)


def _rate(seconds: Floats, weights: Floats, edges: Floats, spans: Floats) -> list[float]:
    counts, _ = np.histogram(seconds, bins=edges, weights=weights)
    return [float(value) for value in counts / spans]
