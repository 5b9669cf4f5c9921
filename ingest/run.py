"""The stage on Ray: plan parts to raw shards, what is committed already left alone."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from importlib.util import find_spec
from typing import Any

import pyarrow.parquet as pq
import ray

from infra.cluster import ClusterConfig, Outcome, run_bounded, session
from infra.config import nearest
from infra.errors import NoSpaceError, RunError, UserError
from infra.lock import exclusive
from infra.logs import Meter, log, progress
from infra.storage import Folder
from ingest.config import IngestConfig
from ingest.retry import passes, plan_pass
from ingest.totals import read_commits, summed
from ingest.worker import ShardWorker
from shards.layout import PLAN, RAW, part_name, shard_name
from shards.manifest import Manifest
from shards.writer import committed

ROWS_WITHOUT_CONTACT = 100_000
_NAMED_PARTS = 5


def ingest(corpus: str, config: IngestConfig, cluster: ClusterConfig, *, retry_failed: bool = False) -> dict[str, Any]:
    """Make the raw shards of a planned corpus; go on where an earlier run stopped, or where shards have gone.

    With `retry_failed`, once every part has its shard, the rows that failed and may do better are tried again,
    into new shards and under their own keys (see `ingest.retry`). A pass that was interrupted is ended first, and
    no other one begun.

    Returns:
        As `ingest.totals.summed`; the sum of `by_status` is `rows_in`.

    Raises:
        UserError: no plan, another configuration, another process at work on the corpus.
        RunError: some parts failed, each for a reason that is logged; all others are done.
    """
    folder = Folder(corpus)
    Manifest.existing(folder)
    with exclusive(folder):
        manifest = Manifest.existing(folder)
        _check_contact(manifest, config)
        _check_faces(folder, config)
        _check_engine(config)
        manifest.begin(RAW, config)
        is_within_a_pass = bool(passes(folder)) and not manifest.still_done(RAW, _names(folder, manifest))
        totals = _complete(folder, manifest, config, cluster)
        if not retry_failed or is_within_a_pass:
            return totals
        planned = manifest.totals(PLAN)
        rows_per_shard = int(manifest.config(PLAN)["rows_per_shard"])
        made = plan_pass(folder, int(planned["parts"]), rows_per_shard)
        if made is None:
            log.info("ingest: no row failed in a way that another try may mend")
            return totals
        log.info("ingest: trying %d rows again, in %d shards", made.rows, made.parts)
        manifest.reopen(RAW)
        return _complete(folder, manifest, config, cluster)


def _complete(folder: Folder, manifest: Manifest, config: IngestConfig, cluster: ClusterConfig) -> dict[str, Any]:
    """Make the shards that are not there, of the plan and of the passes; return the stage's totals."""
    planned = manifest.totals(PLAN)
    names = _names(folder, manifest)
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
            _run_parts(folder, config, cluster, todo, len(names))
    finally:
        raw.sweep_temporary()  # of workers that died on the way
    totals = summed(read_commits(raw, names))
    if totals["rows_in"] != int(planned["rows_out"]):
        raise RunError(f"{raw.url}: {totals['rows_in']} rows in the shards, {planned['rows_out']} in the plan")
    manifest.finish(RAW, totals)
    return totals


def _names(folder: Folder, manifest: Manifest) -> list[str]:
    """Return the names of all shards there are to be, of the plan's parts and of the passes'."""
    parts = int(manifest.totals(PLAN)["parts"]) + sum(one.parts for one in passes(folder))
    return [shard_name(part) for part in range(parts)]


def _check_contact(manifest: Manifest, config: IngestConfig) -> None:
    rows = int(manifest.totals(PLAN).get("rows_out", 0))
    if rows > ROWS_WITHOUT_CONTACT and not config.fetch.contact and not config.fetch.allow_private:
        raise UserError(
            f"{rows:,} rows are to be fetched from other people's servers; set fetch.contact to a page or an "
            "address where their owners find you (it is sent in the User-Agent)"
        )


def _check_faces(folder: Folder, config: IngestConfig) -> None:
    column = config.image.faces_col
    if column is None or not (folder / PLAN).exists(part_name(0)):
        return
    with (folder / PLAN).open(part_name(0)) as stream:
        names = pq.read_schema(stream).names
    if column not in names:
        raise UserError(
            f"image.faces_col: the plan has no column '{column}'; it has {', '.join(names)}{nearest(column, names)}"
        )


def _run_parts(folder: Folder, config: IngestConfig, cluster: ClusterConfig, todo: list[int], parts: int) -> None:
    """Run the parts that have no commit. Raises RunError that names those that failed."""
    with session(cluster) as cores:
        workers = min(config.workers or cores, len(todo))
        actor = ray.remote(_worker_class(config)).options(
            num_cpus=1 if workers <= cores else cores / workers, max_concurrency=config.shards_at_once
        )
        with progress("ingest", parts, "shards") as meter:
            meter.advance(parts - len(todo))
            outcomes = run_bounded(
                lambda number: actor.remote(folder.url, config, workers, number),
                todo,
                workers=workers,
                retries=cluster.retries,
                ahead=config.shards_at_once,
            )
            with closing(outcomes):
                failed = _watch(outcomes, config.failed_parts, meter)
    if failed:
        raise RunError(_failure(folder, failed, len(todo)))


def _check_engine(config: IngestConfig) -> None:
    if config.engine == "img2dataset" and find_spec("img2dataset") is None:
        raise UserError("engine img2dataset: the package is not there; install it with the extra `img2dataset`")
    if config.engine == "img2dataset":
        from ingest.peer import not_kept_to

        log.warning("%s", not_kept_to(config))


def _worker_class(config: IngestConfig) -> type[Any]:
    if config.engine == "native":
        return ShardWorker
    from ingest.peer import PeerWorker

    return PeerWorker


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
