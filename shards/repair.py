"""Mends what can be mended without a guess: drops torn shards and strangers, builds the index anew."""

from __future__ import annotations

from infra.lock import exclusive
from infra.logs import log
from infra.storage import Folder
from shards import index, tombstones
from shards.check import Found, check_shard, read_commit
from shards.layout import FINAL, INDEX, MANIFEST, RAW, STATS_SUFFIX, by_number
from shards.manifest import COMMANDS, Manifest
from shards.verify import VerifyReport
from shards.writer import committed


def repair(report: VerifyReport) -> list[str]:
    """Mend the folder that `report` (of a whole `verify`, not a quick one) is about; return what was done.

    A torn shard loses its commit, then its files, and its stage and those after it are no longer done, so that their
    commands make it again. Only what Pairmill made is dropped: a shard whose own commit is of this format, and in a
    stage's folder one with no commit, or with a damaged one. Of every other the log says what to delete by hand.
    Faults of kind `content` and `unreadable` are left: they need a person.

    The report may be older than what a writer did since: each shard is looked at again, alone with the folder.

    Raises:
        UserError: another process is at work on the folder, or a removal from its corpus was interrupted.
    """
    folder = Folder(report.folder)
    above = Folder(report.folder.rpartition("/")[0] or "/")
    stage = report.folder.rpartition("/")[2]
    is_stage = stage in (RAW, FINAL) and above.exists(MANIFEST)
    again = f"`pairmill {COMMANDS[stage]} {above.url}` makes it again" if is_stage else "make or fetch it again"
    done: list[str] = []
    with exclusive(above if is_stage else folder):
        if is_stage:
            tombstones.check_none_is_open(above)  # its shards may be torn only since it is not ended
        has_commits = bool(committed(folder))
        torn = [one for one in _named(report, "torn") if _is_torn(folder, one, has_commits)]
        dropped = [one for one in torn if _is_to_drop(folder, one, is_stage)]
        for shard in dropped:
            # The commit goes first: a shard is whole or it is not there, at every moment.
            for name in _files(shard):
                folder.delete(name)
            done.append(f"dropped the torn shard {shard}; {again}")
        gone = [one for one in _named(report, "missing") if not folder.exists(one + STATS_SUFFIX)]
        if is_stage and (dropped or gone):
            Manifest.existing(above).reopen(stage, [*dropped, *gone])
        if any(fault.kind == "stranger" for fault in report.faults):
            swept = folder.sweep_temporary()
            done += [f"removed {swept} files left by interrupted writers"] if swept else []
        left = [one for one in torn if one not in dropped]
        _say_what_is_left(folder, left)
        if any(fault.kind in ("torn", "index", "missing") for fault in report.faults):
            done += _reindexed(folder, stage == FINAL, {*left, *_named(report, "unreadable")})
    for line in done:
        log.info("%s: %s", folder.url, line)
    return done


def _named(report: VerifyReport, kind: str) -> list[str]:
    return sorted({fault.shard for fault in report.faults if fault.kind == kind and fault.shard}, key=by_number)


def _files(shard: str) -> tuple[str, str, str]:
    return shard + STATS_SUFFIX, f"{shard}.parquet", f"{shard}.tar"


def _is_torn(folder: Folder, shard: str, has_commits: bool) -> bool:
    """Tell whether a shard is torn as it lies there now; one that cannot be opened may be whole."""
    if not any(folder.exists(name) for name in _files(shard)):
        return False
    if not folder.exists(shard + STATS_SUFFIX) and has_commits:
        return True
    kinds = {fault.kind for fault in check_shard(folder, shard, quick=False).faults}
    return "torn" in kinds and "unreadable" not in kinds


def _is_to_drop(folder: Folder, shard: str, is_stage: bool) -> bool:
    """Tell whether a torn shard is Pairmill's own."""
    found = Found(shard)
    read_commit(folder, found)
    if found.ours:
        return True
    has_foreign_commit = found.ours is False and folder.exists(shard + STATS_SUFFIX)
    is_ours_by_name = not by_number(shard)[0]
    return is_stage and is_ours_by_name and not has_foreign_commit


def _say_what_is_left(folder: Folder, left: list[str]) -> None:
    for shard in left:
        there = ", ".join(name for name in _files(shard) if folder.exists(name))
        log.warning(
            "%s: the shard %s is not one that Pairmill made, and is left; mend it, or delete by hand: %s",
            folder.url, shard, there,
        )  # fmt: skip


def _reindexed(folder: Folder, needs_one: bool, left: set[str]) -> list[str]:
    """Build the index anew, if it is to be there; not over shards in which no sample can be found."""
    if not needs_one and not folder.exists(INDEX):
        return []
    if left and left & set(index.shard_names(folder)):
        log.warning("%s: %s is left as it is until these are mended: %s", folder.url, INDEX, ", ".join(sorted(left)))
        return []
    built = index.build(folder, digests=True)
    index.save(folder, built)
    return [f"built {INDEX} anew: {len(built.shards)} shards, {built.samples} samples"]
