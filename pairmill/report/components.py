"""What dedup says of duplicates in numbers: by method, how far apart, in components of which size; the largest ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dedup.statistics import COSINE_STEP, giant, rows_found
from infra.storage import Folder
from pairmill.report.charts import Chart, stacked
from pairmill.report.clusters import Member, members
from pairmill.report.pictures import Album
from pairmill.report.rows import Source
from pairmill.report.wording import number
from shards.layout import DEDUP, RAW
from shards.manifest import Manifest

PICTURES = 6
"""Pictures shown of each of the largest components."""


@dataclass(frozen=True)
class Component:
    """One group of samples that links hold together; `methods` are how many went by each."""

    size: int
    share: float
    methods: str
    members: tuple[Member, ...]


@dataclass(frozen=True)
class Statistics:
    """What there is to say; empty parts are left out of the page."""

    methods: tuple[tuple[str, int, float], ...]
    sizes: tuple[tuple[str, int], ...]
    charts: tuple[Chart, ...]
    largest: tuple[Component, ...]
    warning: str


def statistics(corpus: Folder, manifest: Manifest, album: Album, sources: list[Source]) -> Statistics | None:
    """Return the statistics of dedup; None where it is not done, or was by a version that made none."""
    totals = manifest.totals(DEDUP)
    if "component_sizes" not in totals:
        return None
    largest = totals["largest_components"]
    raw = Source(corpus / RAW)
    sources.append(raw)
    keys = {one["component"]: one["keys"][:PICTURES] for one in largest}
    found = members(raw, [key for some in keys.values() for key in some], album)
    rows, all_rows = max(1, totals["rows_in"]), max(1, rows_found(totals))
    components = tuple(
        Component(
            one["size"],
            one["size"] / all_rows,
            _said(one["methods"]),
            tuple(found[key] for key in keys[one["component"]]),
        )
        for one in largest
    )
    return Statistics(
        tuple(_methods(totals.get("by_reason", {}), rows)), tuple(totals["component_sizes"].items()),
        tuple(chart for chart in (_distances(totals), _cosines(totals)) if chart), components, giant(totals),
    )  # fmt: skip


def _methods(reasons: Mapping[str, int], rows: int) -> list[tuple[str, int, float]]:
    found = [(name.removeprefix("duplicate_").replace("_", " "), count) for name, count in reasons.items()]
    return [(name, count, count / rows) for name, count in sorted(found, key=lambda one: -one[1])]


def _said(methods: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(methods.items(), key=lambda one: -one[1]))


def _distances(totals: Mapping[str, Any]) -> Chart | None:
    counts = {int(bits): count for bits, count in totals.get("distances", {}).items()}
    if not counts:
        return None
    end = max(counts) + 1
    return stacked(
        "Removed for their look, by distance", range(end + 1),
        [("", "kept", [counts.get(bits, 0) for bits in range(end)])], number, lambda bits: f"{bits:.0f} bits",
        range(0, end + 1, max(1, end // 4)), latest=f"{sum(counts.values()):,}",
    )  # fmt: skip


def _cosines(totals: Mapping[str, Any]) -> Chart | None:
    counts = {round(float(low) / COSINE_STEP): count for low, count in totals.get("cosines", {}).items()}
    if not counts:
        return None
    low, end = min(counts), max(counts) + 1
    return stacked(
        "Removed for their embeddings, by cosine", [step * COSINE_STEP for step in range(low, end + 1)],
        [("", "kept", [counts.get(step, 0) for step in range(low, end)])], number, lambda cosine: f"{cosine:.3f}",
        [step * COSINE_STEP for step in range(low, end + 1, max(1, (end - low) // 4))],
        latest=f"{sum(counts.values()):,}",
    )  # fmt: skip
