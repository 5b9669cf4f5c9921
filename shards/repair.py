"""Mends what can be mended without a guess: drops torn shards and strangers, builds the index anew."""

from __future__ import annotations

from infra.lock import exclusive
from infra.logs import log
from infra.storage import Folder
from shards import index
from shards.layout import FINAL, INDEX, MANIFEST, RAW, STATS_SUFFIX, by_number
from shards.manifest import COMMANDS, Manifest
from shards.verify import VerifyReport
from shards.writer import committed


def repair(report: VerifyReport) -> list[str]:
    """Mend the folder that `report` (of a whole `verify`, not a quick one) is about; return what was done.

    A torn shard of this format loses its commit, then its files, and its stage and those after it are no
    longer done, so that their commands make it again. In a folder without commits nothing is dropped. Faults
    of kind `content` are left: they need a person.

    Raises:
        UserError: another process is at work on the folder, or a tar without a commit is damaged.
    """
    folder = Folder(report.folder)
    above = Folder(report.folder.rpartition("/")[0] or "/")
    stage = report.folder.rpartition("/")[2]
    is_stage = stage in (RAW, FINAL) and above.exists(MANIFEST)
    again = f"`pairmill {COMMANDS[stage]} {above.url}` makes it again" if is_stage else "make or fetch it again"
    done: list[str] = []
    with exclusive(above if is_stage else folder):
        lost = {fault.shard for fault in report.faults if fault.kind in ("torn", "missing") and fault.shard}
        torn = {fault.shard for fault in report.faults if fault.kind == "torn" and fault.shard}
        for shard in sorted(torn, key=by_number) if committed(folder) else []:
            # The commit goes first: a shard is whole or it is not there, at every moment.
            for name in (shard + STATS_SUFFIX, f"{shard}.parquet", f"{shard}.tar"):
                folder.delete(name)
            done.append(f"dropped the torn shard {shard}; {again}")
        if is_stage and lost:
            Manifest.existing(above).reopen(stage, lost)
        if any(fault.kind == "stranger" for fault in report.faults):
            swept = folder.sweep_temporary()
            done += [f"removed {swept} files left by interrupted writers"] if swept else []
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
