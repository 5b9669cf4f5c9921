"""Gathers everything about a corpus and a run, and writes it as one page that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from infra.storage import Folder
from pairmill.report import (
    accounting,
    clusters,
    components,
    curves,
    facts,
    gallery,
    overlap,
    sheets,
    thresholds,
    throughput,
    wording,
)
from pairmill.report.pictures import Album
from pairmill.report.rows import Source
from shards.layout import DEDUP, PLAN, RAW
from shards.manifest import Manifest

HERE = Path(__file__).parent
PAGE = "page.html.j2"


def build(corpus: str, run: str | None, out: str, measured: Mapping[str, Any] | None = None) -> str:
    """Write the report about `corpus`, and `run` if given, to the local file `out`; return its path.

    Works for a corpus at any stage; the same corpus and run give the same page.

    Args:
        corpus: the corpus' folder or URL.
        run: a training run's folder or URL.
        out: local file to write.
        measured: `seconds` by stage and `peak_memory_bytes` of the whole job, where they are known; by default
            taken from the `result.json` of a quickstart that made both, if there is one.

    Raises:
        UserError: there is no corpus at `corpus`.
        RunError: a result in it is damaged.
    """
    folder, run_folder = Folder(corpus), Folder(run) if run else None
    manifest = Manifest.existing(folder)
    if measured is None:
        measured = facts.measured_beside(folder, run_folder)
    page = _environment().get_template(PAGE).render(_content(folder, run_folder, manifest, measured))
    target = Path(out)
    Folder(target.parent).write(target.name, page.encode("utf-8", "replace"))
    return str(target)


def _content(corpus: Folder, run: Folder | None, manifest: Manifest, measured: Mapping[str, Any]) -> dict[str, Any]:
    album, sources = Album(), list[Source]()
    stages = accounting.stages(corpus, manifest)
    suites = gallery.gallery(run, album) if run else []
    kept, kept_is_final = sheets.kept(corpus, album, sources)
    log = curves.log_lines(run) if run else []
    large, small = curves.curves(log)
    duplicates = clusters.duplicates(corpus, album, sources)
    return {
        "title": facts.title(manifest),
        "corpus": corpus.url,
        "run": run.url if run else "",
        "figures": facts.figures(manifest, suites, measured),
        "parts": facts.parts(manifest, stages),
        "stages": stages,
        "waiting": accounting.waiting(stages),
        "kept": kept,
        "kept_is_final": kept_is_final,
        "rejected": sheets.rejected(corpus, _reasons(manifest, stages), sources),
        "duplicates": duplicates,
        "taken_down": manifest.totals(DEDUP).get("taken_down", 0),
        "test_sets": overlap.test_sets(manifest.totals(DEDUP)),
        "thresholds": thresholds.thresholds(corpus, manifest, album, sources),
        "statistics": components.statistics(corpus, manifest, album, sources),
        "throughput": throughput.throughput(corpus, sources),
        "large_curves": large,
        "small_curves": small,
        "suites": suites,
        "album": album,
        "unreadable": sorted({path for source in sources for path in source.unreadable}),
    }


def _reasons(manifest: Manifest, stages: list[accounting.Stage]) -> dict[str, dict[str, int]]:
    """Return the counts by reason of the plan and of ingest, as far as it has come."""
    counts = {PLAN: dict(manifest.totals(PLAN).get("by_reason", {}))}
    for stage in stages:
        if stage.command == "ingest":
            counts[RAW] = {line.note: line.count for line in stage.lines if line.note}
    return counts


def _environment() -> jinja2.Environment:
    # Captions, names and addresses come from the web: autoescape keeps them text.
    environment = jinja2.Environment(
        autoescape=True,
        loader=jinja2.FileSystemLoader(HERE),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "count": wording.number, "percent": wording.percent, "reason": wording.reason, "breakable": wording.breakable,
    }  # fmt: skip
    return environment
