"""The stages in order, as the command line, `pairmill run` and the quickstart call them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field

from dedup.config import DedupConfig
from infra.cluster import ClusterConfig, session
from infra.config import Config, load_toml, override
from infra.errors import RunError, UserError
from infra.storage import Folder
from ingest.config import IngestConfig, PlanConfig
from shards.layout import FINAL, INDEX
from shards.repack import RepackConfig

ConfigT = TypeVar("ConfigT", bound=Config)
STAGES = ("plan", "ingest", "dedup", "repack", "verify")
Measure = Callable[[str], AbstractContextManager[None]]


class CorpusConfig(Config):
    """One TOML file a corpus: a table a stage, with the names the command line has."""

    corpus: str = Field(description="folder or URL of the corpus")
    plan: PlanConfig = Field(PlanConfig(), description="rows to plan parts")
    ingest: IngestConfig = Field(IngestConfig(), description="plan parts to raw shards")
    dedup: DedupConfig = Field(DedupConfig(), description="who is a duplicate of whom")
    repack: RepackConfig = Field(RepackConfig(), description="kept samples to final shards")
    cluster: ClusterConfig = Field(ClusterConfig(), description="where the work runs")


def _unmeasured(_stage: str) -> AbstractContextManager[None]:
    return nullcontext()


def stage_config(toml: Path | None, stage: str, given: ConfigT) -> ConfigT:
    """Return the `stage` table of `toml`, if there is one, with the command line's options laid over it."""
    if toml is None:
        return given
    base: ConfigT = getattr(load_toml(toml, CorpusConfig), stage)
    return override(base, given)


def plan(corpus: str, config: PlanConfig) -> dict[str, Any]:
    """Rows to plan parts."""
    from ingest.plan import plan as run_plan

    return {"stage": "plan", **run_plan(corpus, config)}


def ingest(corpus: str, config: IngestConfig, cluster: ClusterConfig, *, retry_failed: bool = False) -> dict[str, Any]:
    """Plan parts to raw shards; with `retry_failed`, then once more what failed and may do better."""
    from ingest.run import ingest as run_ingest

    return {"stage": "ingest", **run_ingest(corpus, config, cluster, retry_failed=retry_failed)}


def dedup(corpus: str, config: DedupConfig, cluster: ClusterConfig, *, anew: bool = False) -> dict[str, Any]:
    """Who is a duplicate of whom; with `anew` also under another configuration than before."""
    from dedup.run import dedup as run_dedup

    return {"stage": "dedup", **run_dedup(corpus, config, cluster, anew=anew)}


def overlap(corpus: str, config: DedupConfig, cluster: ClusterConfig) -> dict[str, Any]:
    """What a corpus has in common with test sets; nothing is written."""
    from dedup.overlap import report_overlap

    return report_overlap(corpus, config, cluster)


def repack(corpus: str, config: RepackConfig, cluster: ClusterConfig) -> dict[str, Any]:
    """Kept samples to final shards."""
    from shards.repack import repack as run_repack

    return {"stage": "repack", **run_repack(corpus, config, cluster)}


def remove(
    corpus: str, listed: str, cluster: ClusterConfig, *, reason: str = "", dry_run: bool = False
) -> dict[str, Any]:
    """Take out of a corpus what a list names; with `dry_run` say what would go."""
    from dedup.takedown import remove as run_removal

    return {"corpus": corpus, **run_removal(corpus, listed, cluster, reason=reason, dry_run=dry_run)}


def verify(folder: str, *, quick: bool = False, repair: bool = False) -> dict[str, Any]:
    """Check a shard folder; the result's `faults` is empty when all is well.

    With `repair`, what can be mended without a guess is: `repaired` says in words what was done, the rest is what
    a second look found.

    Raises:
        UserError: no such folder, no shards, `repair` and `quick` at once, or another process at work there.
    """
    from shards.repair import repair as run_repair
    from shards.verify import VerifyReport
    from shards.verify import verify as run_verify
    from shards.writer import committed

    if quick and repair:
        raise UserError("--repair needs to have read every byte; leave --quick out")
    report = run_verify(folder, quick=quick)
    if not repair:
        return {"folder": folder, **report.as_dict()}
    repaired = run_repair(report) if report.faults else []
    if repaired:
        place = Folder(folder)
        report = run_verify(place) if committed(place) or place.exists(INDEX) else VerifyReport(place.url)
    return {"folder": folder, **report.as_dict(), "repaired": repaired}


def index(folder: str, *, digests: bool = False) -> dict[str, Any]:
    """Find the samples of a shard folder and write `index.parquet`; with `digests`, of foreign tars too.

    Raises:
        UserError: no shards there, a tar is missing or damaged, or another process at work there.
    """
    from infra.lock import exclusive
    from shards import index as shard_index

    place = Folder(folder)
    if not shard_index.shard_names(place):
        raise UserError(f"{place.url}: no shards here (no committed .tar files); name a shard folder")
    with exclusive(place):
        built = shard_index.build(place, digests=digests)
        shard_index.save(place, built)
    return {
        "index": place.path(INDEX), "shards": len(built.shards), "samples": built.samples, "bytes": built.tar_bytes
    }  # fmt: skip


def evaluate(checkpoint: str, suite: str) -> dict[str, Any]:
    """Measure a checkpoint zero-shot on a suite; the result is also kept in the run's folder `evaluation`."""
    from train.evaluate.run import evaluate as run_evaluation

    result: dict[str, Any] = {"suite": suite, **run_evaluation(checkpoint, suite)}
    folder = Folder(checkpoint)
    if folder.exists("checkpoints"):
        (folder / "evaluation").write_json(f"{Path(suite).name}.json", result)
    return result


def run(toml: Path, cluster: ClusterConfig) -> list[dict[str, Any]]:
    """Build the corpus that `toml` describes; stages that are done are skipped.

    Raises:
        UserError: the file is wrong.
        RunError: a stage failed, or the final shards are not sound.
    """
    config = load_toml(toml, CorpusConfig)
    return build(config.model_copy(update={"cluster": override(config.cluster, cluster)}))


def build(config: CorpusConfig, measure: Measure = _unmeasured) -> list[dict[str, Any]]:
    """Run plan, ingest, dedup and repack in one Ray session, then verify; return their totals in order.

    `measure(stage)` is entered around each of `STAGES`.

    Raises:
        RunError: a stage failed, or the final shards are not sound.
    """
    corpus, cluster = config.corpus, config.cluster
    with measure("plan"):
        results = [plan(corpus, config.plan)]
    with session(cluster):
        with measure("ingest"):
            results.append(ingest(corpus, config.ingest, cluster))
        with measure("dedup"):
            results.append(dedup(corpus, config.dedup, cluster))
        with measure("repack"):
            results.append(repack(corpus, config.repack, cluster))
    with measure("verify"):
        checked = verify((Folder(corpus) / FINAL).url)
    if checked["faults"]:
        first = checked["faults"][0]
        raise RunError(f"{checked['folder']}: {len(checked['faults'])} faults, the first: {first}")
    return [*results, {"stage": "verify", **checked}]
