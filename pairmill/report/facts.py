"""The headline: what came in, what came out, how good it is, what it took. Only what is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from infra.errors import RunError
from infra.storage import Folder
from pairmill.report.accounting import Stage
from pairmill.report.gallery import SuiteResult
from pairmill.report.wording import duration, percent, size
from shards.layout import DEDUP, FINAL, PLAN, RAW
from shards.manifest import Manifest

RESULT = "result.json"
_SUITES_IN_HEADLINE = 2


@dataclass(frozen=True)
class Figure:
    """A number of the headline, what it counts, and a word about it."""

    value: str
    label: str
    note: str = ""


@dataclass(frozen=True)
class Part:
    """A part of all rows: where they went."""

    name: str
    count: int
    share: float
    tone: str


def measured_beside(corpus: Folder, run: Folder | None) -> Mapping[str, Any]:
    """Return the `result.json` that a quickstart left beside both the corpus and the run; empty without one."""
    above = corpus.url.rpartition("/")[0]
    if run is None or not above or run.url.rpartition("/")[0] != above:
        return {}
    folder = Folder(above)
    try:
        content = folder.read_json(RESULT) if folder.exists(RESULT) else None
    except (OSError, RunError):
        return {}
    return content if isinstance(content, dict) and {"stages", "seconds"} <= content.keys() else {}


def figures(manifest: Manifest, suites: list[SuiteResult], measured: Mapping[str, Any]) -> list[Figure]:
    """Return the headline's figures. `measured` may hold `seconds` by stage and `peak_memory_bytes`."""
    found = []
    rows, kept = rows_in(manifest), samples(manifest)
    if rows is not None:
        found.append(Figure(f"{rows:,}", "rows in"))
    if kept is not None:
        found.append(Figure(f"{kept:,}", "samples kept", f"{kept / rows:.1%} of the rows" if rows else ""))
    for suite in suites[:_SUITES_IN_HEADLINE]:
        share, note = suite.headline
        found.append(Figure(percent(share), suite.title, note))
    seconds = {str(name): float(value) for name, value in (measured.get("seconds") or {}).items()}
    if seconds:
        longest = sorted(seconds, key=lambda name: -seconds[name])[:2]
        note = ", ".join(f"{name} {duration(seconds[name])}" for name in longest)
        found.append(Figure(duration(sum(seconds.values())), "from start to end", note))
    elif manifest.totals(RAW).get("seconds"):
        found.append(Figure(duration(float(manifest.totals(RAW)["seconds"])), "of ingest"))
    if measured.get("peak_memory_bytes"):
        found.append(Figure(size(float(measured["peak_memory_bytes"])), "memory", "of all processes, at the peak"))
    return found


def rows_in(manifest: Manifest) -> int | None:
    """Return how many rows the plan read, None before it has."""
    rows = manifest.totals(PLAN).get("rows_in")
    return int(rows) if rows is not None else None


def samples(manifest: Manifest) -> int | None:
    """Return how many samples the newest finished stage keeps, None before ingest is done."""
    final, dedup, raw = (manifest.totals(name) for name in (FINAL, DEDUP, RAW))
    count = final.get("samples", dedup.get("kept", raw.get("by_status", {}).get("success")))
    return int(count) if count is not None else None


def title(manifest: Manifest) -> str:
    """Return the page's headline in words."""
    rows, kept = rows_in(manifest), samples(manifest)
    if rows is None:
        return "A corpus before its first row"
    return f"From {rows:,} rows to {kept:,} samples" if kept is not None else f"What becomes of {rows:,} rows"


def parts(manifest: Manifest, found: list[Stage]) -> list[Part]:
    """Return where all rows of the plan went: kept, or lost at which stage; empty before ingest is done."""
    rows, kept = rows_in(manifest), samples(manifest)
    if not rows or kept is None:
        return []
    tones = {"plan": "filtered", "ingest": "failed_to_download", "dedup": "failed_to_resize"}
    lost = [(stage.command, stage.rows_in - stage.kept) for stage in found if stage.command in tones]
    whole = [("kept", kept, "kept"), *((f"lost at {name}", count, tones[name]) for name, count in lost)]
    return [Part(name, count, count / rows, tone) for name, count, tone in whole if count]
