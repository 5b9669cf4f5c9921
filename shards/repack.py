"""Kept samples to final shards of even size, in a seeded order, on Ray."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import numpy as np
import ray
from pydantic import Field

from infra import metrics
from infra.cluster import ClusterConfig, run_bounded, session
from infra.config import Config
from infra.errors import NoSpaceError, RunError
from infra.lock import exclusive
from infra.logs import log, progress
from infra.storage import Folder
from shards import index
from shards.layout import FINAL, INDEX, MAX_ROWS_PER_SHARD, RAW, STATS_SUFFIX, Status, by_number, shard_name
from shards.manifest import Manifest
from shards.repacker import Layout, Repacker
from shards.selection import removed_count
from shards.writer import committed

Task = tuple[str, int, str]
FEW_SHARDS = 64


class RepackConfig(Config):
    """What final shards are like."""

    samples_per_shard: int = Field(
        MAX_ROWS_PER_SHARD,
        description="most samples in a final shard; all shards have this many, or evenly fewer",
        ge=1,
        le=MAX_ROWS_PER_SHARD,
    )
    seed: int = Field(0, description="seed of the order in which samples are written", ge=0)


def repack(corpus: str, config: RepackConfig, cluster: ClusterConfig) -> dict[str, Any]:
    """Write `final/` from the samples of `raw/` that dedup kept; what is committed already is left alone.

    Returns:
        Totals: `rows_in` (successes of raw), `by_status` (`success` and `filtered`, their sum is `rows_in`),
        `by_reason` (of those filtered), `shards`, `samples`, `bytes` (of the tars), and where samples were taken
        down since the shards were laid out `holes`, the places that they keep.

    Raises:
        UserError: no corpus, dedup is not done, another configuration, another process at work on the corpus.
        RunError: a raw shard is damaged, the disk is full; the message names it.
    """
    folder = Folder(corpus)
    Manifest.existing(folder)
    with exclusive(folder):
        manifest = Manifest.existing(folder)
        manifest.begin(FINAL, config)
        names = map(shard_name, range(int(manifest.totals(FINAL).get("shards", 0))))
        if manifest.still_done(FINAL, names) and (folder / FINAL).exists(INDEX):
            return manifest.totals(FINAL)
        raw = manifest.shards(RAW)
        (folder / FINAL).sweep_temporary()
        try:
            with session(cluster) as cores:
                layout, removed, holes = _laid_out(folder.url, raw, config, cores, cluster)
                _write_shards(folder.url, layout, cores, cluster)
        finally:
            (folder / FINAL).sweep_temporary()  # of workers that ended on the way
        totals = _finished(folder / FINAL, layout, removed, holes)
        manifest.finish(FINAL, totals)
    return totals


def _laid_out(
    corpus: str, names: list[str], config: RepackConfig, cores: int, cluster: ClusterConfig
) -> tuple[Layout, Counter[str], int]:
    """Count the kept samples of the raw shards `names`, and lay the final shards out; some may be holes.

    Raises RunError.
    """
    folder = Folder(corpus)
    kept, digests = np.zeros(len(names), dtype=np.int64), [""] * len(names)
    removed: Counter[str] = Counter()
    holes = 0
    with progress("repack: selecting", len(names), "shards") as meter:
        tasks = (("select", number, name) for number, name in enumerate(names))
        for (_, number, _), found in _selected(corpus, tasks, len(names), cores, cluster):
            kept[number], digests[number] = found["kept"], found["digest"]
            removed.update(found["removed"])
            holes += found["holes"]
            meter.advance(kept=int(kept.sum()), removed=removed.total())
    listed = removed_count(folder)
    if removed.total() != listed:
        raise RunError(
            f"{corpus}: dedup removed {listed} keys, {removed.total()} of them are samples of raw/; "
            "the two do not belong together, run dedup again in a new corpus"
        )
    essence = json.dumps([config.samples_per_shard, config.seed, names, digests]).encode()
    layout = Layout(names, kept.tolist(), config.samples_per_shard, config.seed, _hex(essence))
    return layout, removed, holes


def _selected(
    corpus: str, tasks: Iterator[Task], count: int, cores: int, cluster: ClusterConfig
) -> Iterator[tuple[Task, dict[str, Any]]]:
    """Run `count` selections; yield (task, result). Few are done here, sooner than workers are started."""
    if count > FEW_SHARDS:
        actor = ray.remote(Repacker)
        yield from _outcomes(lambda _: actor.remote(corpus), tasks, cores, cluster)
        return
    here = Repacker(corpus)
    for task in tasks:
        yield task, here.run(task)


def _write_shards(corpus: str, layout: Layout, cores: int, cluster: ClusterConfig) -> None:
    """Write the final shards that have no commit yet. Raises RunError when some could not be written."""
    final = Folder(corpus) / FINAL
    there = set(committed(final))
    wanted = [shard_name(number) for number in range(layout.shards)]
    for name in sorted(there, key=by_number):
        if name not in wanted or final.read_json(name + STATS_SUFFIX).get("layout") != layout.digest:
            log.warning("%s: is of an earlier selection of samples; writing it anew", final.path(name))
            _drop(final, name)
            there.discard(name)
    tasks = [("write", number, name) for number, name in enumerate(wanted) if name not in there]
    actor = ray.remote(Repacker)
    shared = ray.put(layout)
    failed: list[str] = []
    with progress("repack", len(wanted), "shards") as meter:
        meter.advance(len(wanted) - len(tasks))
        for (_, _, _), stats in _outcomes(lambda _: actor.remote(corpus, shared), iter(tasks), cores, cluster, failed):
            metrics.shards().inc(tags={"stage": FINAL})
            metrics.rows().inc(stats["successes"], tags={"stage": FINAL, "status": Status.SUCCESS, "reason": ""})
            meter.advance(samples=stats["successes"])
    if failed:
        raise RunError(f"repack: {len(failed)} of {len(wanted)} shards failed, the first: {failed[0]}")


def _outcomes(
    make_actor: Callable[[int], Any],
    tasks: Iterator[Task],
    cores: int,
    cluster: ClusterConfig,
    failed: list[str] | None = None,
) -> Iterator[tuple[Task, dict[str, Any]]]:
    """Run tasks; yield (task, result). A failure is put into `failed`, or raised as RunError without one."""
    with closing(run_bounded(make_actor, tasks, workers=cores, retries=cluster.retries)) as outcomes:
        for outcome in outcomes:
            if outcome.error is None:
                yield outcome.task, outcome.value
                continue
            if outcome.no_space:
                raise NoSpaceError(outcome.error)
            message = f"shard {outcome.task[2]}: {outcome.error}"
            if failed is None:
                raise RunError(f"repack: {message}")
            log.error("repack: %s", message)
            failed.append(message)


def _finished(final: Folder, layout: Layout, removed: Counter[str], holes: int) -> dict[str, Any]:
    """Write the index and return the totals."""
    built = index.build(final)
    if built.samples != layout.samples:
        raise RunError(f"{final.url}: {built.samples} samples in the shards, {layout.samples} were kept")
    index.save(final, built)
    kept = layout.samples - holes
    return {
        "rows_in": kept + removed.total(),
        "by_status": {Status.SUCCESS.value: kept, Status.FILTERED.value: removed.total()},
        "by_reason": dict(sorted(removed.items())),
        "shards": len(built.shards),
        "samples": kept,
        "bytes": built.tar_bytes,
    } | ({"holes": holes} if holes else {})


def _drop(final: Folder, name: str) -> None:
    # The commit goes first: a shard is whole or it is not there, at every moment.
    for doomed in (INDEX, name + STATS_SUFFIX, f"{name}.parquet", f"{name}.tar"):
        final.delete(doomed)


def _hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
