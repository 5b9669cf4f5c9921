"""Mends what can be mended without a guess: drops torn shards and strangers, builds the index anew."""

from __future__ import annotations

from infra.lock import exclusive
from infra.logs import log
from infra.storage import Folder
from shards import index
from shards.layout import FINAL, INDEX, MANIFEST, RAW, STATS_SUFFIX
from shards.manifest import Manifest
from shards.verify import VerifyReport
from shards.writer import committed


def repair(report: VerifyReport) -> list[str]:
    """Mend the folder that `report` (of a whole `verify`, not a quick one) is about; return what was done.

    A torn shard of this format loses its commit, then its files, so that the stage that made it makes it
    again. In a folder without commits nothing is dropped. Faults of kind `content` are left: they need a
    person.

    Raises:
        UserError: another process is at work on the folder.
    """
    folder = Folder(report.folder)
    above = Folder(report.folder.rpartition("/")[0] or "/")
    stage = report.folder.rpartition("/")[2]
    is_stage = stage in (RAW, FINAL) and above.exists(MANIFEST)
    done: list[str] = []
    with exclusive(above if is_stage else folder):
        ours = set(committed(folder))
        torn = {fault.shard for fault in report.faults if fault.kind == "torn" and fault.shard}
        for shard in sorted(torn) if ours else []:
            # The commit goes first: a shard is whole or it is not there, at every moment.
            for name in (shard + STATS_SUFFIX, f"{shard}.parquet", f"{shard}.tar"):
                folder.delete(name)
            done.append(f"dropped the torn shard {shard}; run the stage that made it again")
        if is_stage and ours and torn:
            Manifest.existing(above).reopen(stage)
        if any(fault.kind == "stranger" for fault in report.faults):
            done.append(f"removed {folder.sweep_temporary()} files left by interrupted writers")
        if any(fault.kind in ("torn", "index", "missing") for fault in report.faults):
            done += _reindexed(folder, stage == FINAL)
    for line in done:
        log.info("%s: %s", folder.url, line)
    return done


def _reindexed(folder: Folder, needs_one: bool) -> list[str]:
    if not needs_one and not folder.exists(INDEX):
        return []
    built = index.build(folder, digests=True)
    index.save(folder, built)
    return [f"built {INDEX} anew: {len(built.shards)} shards, {built.samples} samples"]
