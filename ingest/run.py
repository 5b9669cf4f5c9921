"""The stage on Ray: plan parts to raw shards, what is committed already left alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from typing import Any

import ray

from infra.cluster import ClusterConfig, Outcome, run_bounded, session
from infra.errors import NoSpaceError, RunError, UserError
from infra.lock import exclusive
from infra.logs import Meter, log, progress
from infra.storage import Folder
from ingest.config import IngestConfig
from ingest.worker import ShardWorker
from shards.layout import PLAN, RAW, STATS_SUFFIX, part_name, shard_name
from shards.manifest import Manifest
from shards.writer import committed

ROWS_WITHOUT_CONTACT = 100_000
_NAMED_PARTS = 5


def ingest(corpus: str, config: IngestConfig, cluster: ClusterConfig) -> dict[str, Any]:
    """Make the raw shards of a planned corpus; go on where an earlier run stopped, or where shards have gone.

    Returns:
        `rows_in`, `by_status` (its sum is `rows_in`), `by_reason`, `shards`, `bytes`, `seconds` (the time in
        which any shard was in hand), `images_per_s`.

    Raises:
        UserError: no plan, another configuration, another process at work on the corpus.
        RunError: some parts failed, each for a reason that is logged; all others are done.
    """
    folder = Folder(corpus)
    manifest = Manifest.existing(folder)
    with exclusive(folder):
        manifest = Manifest.existing(folder)
        _check_contact(manifest, config)
        manifest.begin(RAW, config)
        parts = int(manifest.totals(PLAN)["parts"])
        names = [shard_name(part) for part in range(parts)]
        if manifest.still_done(RAW, names):
            return manifest.totals(RAW)
        raw = folder / RAW
        swept = raw.sweep_temporary()
        if swept:
            log.info("ingest: removed %d unfinished files of an interrupted run", swept)
        done = set(committed(raw))
        todo = [part for part, name in enumerate(names) if name not in done]
        try:
            if todo:
                _run_parts(folder, config, cluster, todo, parts)
        finally:
            raw.sweep_temporary()  # of workers that died on the way
        totals = _totals(raw, names)
        planned = int(manifest.totals(PLAN)["rows_out"])
        if totals["rows_in"] != planned:
            raise RunError(f"{raw.url}: {totals['rows_in']} rows in the shards, {planned} in the plan")
        manifest.finish(RAW, totals)
    return totals


def _check_contact(manifest: Manifest, config: IngestConfig) -> None:
    rows = int(manifest.totals(PLAN).get("rows_out", 0))
    if rows > ROWS_WITHOUT_CONTACT and not config.fetch.contact and not config.fetch.allow_private:
        raise UserError(
            f"{rows:,} rows are to be fetched from other people's servers; set fetch.contact to a page or an "
            "address where their owners find you (it is sent in the User-Agent)"
        )


def _run_parts(folder: Folder, config: IngestConfig, cluster: ClusterConfig, todo: list[int], parts: int) -> None:
    """Run the parts that have no commit. Raises RunError that names those that failed."""
    with session(cluster) as cores:
        workers = min(config.workers or cores, len(todo))
        actor = ray.remote(ShardWorker).options(
            num_cpus=1 if workers <= cores else cores / workers, max_concurrency=config.shards_at_once
        )
        with progress("ingest", parts, "shards") as meter:
            meter.advance(parts - len(todo))
            outcomes = run_bounded(
                lambda: actor.remote(folder.url, config, workers),
                todo,
                workers=workers,
                retries=cluster.retries,
                ahead=config.shards_at_once,
            )
            with closing(outcomes):
                failed = _watch(outcomes, config.failed_parts, meter)
    if failed:
        raise RunError(_failure(folder, failed, len(todo)))


def _watch(outcomes: Iterable[Outcome[int]], patience: int, meter: Meter) -> dict[int, str]:
    """Follow the outcomes to the end, or until `patience` parts have failed with none done between.

    Raises:
        NoSpaceError: a part met a full disk.
    """
    failed: dict[int, str] = {}
    in_a_row = rows = images = 0
    for outcome in outcomes:
        if outcome.error is not None:
            if outcome.no_space:
                raise NoSpaceError(outcome.error)
            log.error("ingest: %s failed: %s", part_name(outcome.task), outcome.error)
            failed[outcome.task] = outcome.error
            in_a_row += 1
            if in_a_row >= patience:
                break
            continue
        in_a_row = 0
        rows += outcome.value["count"]
        images += outcome.value["successes"]
        meter.advance(1, rows=rows, images=images)
    return failed


def _failure(folder: Folder, failed: dict[int, str], tried: int) -> str:
    names = [part_name(part) for part in sorted(failed)]
    shown = ", ".join(names[:_NAMED_PARTS]) + (f" and {len(names) - _NAMED_PARTS} more" * (len(names) > _NAMED_PARTS))
    return (
        f"{folder.url}: {len(failed)} of {tried} parts failed ({shown}), the first: {failed[min(failed)]}; "
        "mend that and run the same command again, what is finished will not be done twice"
    )


def _totals(raw: Folder, names: list[str]) -> dict[str, Any]:
    statuses: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    rows = size = 0
    spans: list[tuple[float, float]] = []
    for name in names:
        stats = raw.read_json(f"{name}{STATS_SUFFIX}")
        statuses.update(stats["by_status"])
        reasons.update(stats["by_reason"])
        rows, size = rows + stats["count"], size + stats["bytes"]
        spans.append((stats["start_time"], stats["end_time"]))
    seconds = busy_seconds(spans)
    return {
        "rows_in": rows,
        "by_status": dict(sorted(statuses.items())),
        "by_reason": dict(sorted(reasons.items())),
        "shards": len(names),
        "bytes": size,
        "seconds": round(seconds, 3),
        "images_per_s": round(statuses["success"] / seconds, 2) if seconds else 0.0,
    }


def busy_seconds(spans: Iterable[tuple[float, float]]) -> float:
    """Return how long at least one of the (start, end) spans lasted: pauses between runs do not count."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
