"""Take-down: samples that a list names go from every stage's folder, and do not come back."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dedup.spread import FEW_TASKS, few_or_on_ray
from dedup.takedown_aside import bereft, is_laid_out, removals, without
from dedup.takedown_back import outlook
from dedup.takedown_list import read_list
from dedup.takedown_plan import Plan, planned, totals_after
from dedup.takedown_work import TakeDown, tasks_of
from infra.cluster import ClusterConfig, session
from infra.lock import exclusive
from infra.logs import log, progress
from infra.storage import Folder
from shards import tombstones
from shards.barred import Entry
from shards.layout import DEDUP, FINAL, PLAN, RAW, REMOVED, RETRY, SIGNATURES, THRESHOLDS, TOMBSTONES
from shards.manifest import Manifest
from shards.remove import update_index
from shards.tombstones import Tombstone
from shards.writer import committed


def remove(
    corpus: str, where: str, cluster: ClusterConfig, *, reason: str = "", dry_run: bool = False
) -> dict[str, Any]:
    """Take out of a corpus the samples that the list at `where` names (see `dedup.takedown_list`).

    Only shards that hold them are rewritten. A tombstone keeps them from coming back; it has the time, the `reason`
    and what matched. Interrupted at any point, the same call again ends in the same bytes: what was begun is ended
    first, as it was begun. With `dry_run` nothing is changed, and `going` lists what would go.

    Returns:
        `samples`, `shards` by stage, `unmatched` (entries that name no sample), `unhashed` (samples that have no
        hash for a `pdq` entry to be compared with), `back` (samples that had gone for one of them and are no copies:
        they stay from the next repack on), `left_out` (such where `final/` is laid out already: they stay out of it),
        `copies_left` (keys of samples that stay and that one of them had gone for, as a copy; no entry names those),
        `tombstone` (None where nothing is new), `going`.

    Raises:
        UserError: a malformed list, no corpus, another process at work on it.
        RunError: a shard is damaged; the others are done.
    """
    entries, folder = read_list(where), Folder(corpus)
    Manifest.existing(folder)
    if dry_run:
        with _workers(folder, cluster):
            plan = planned(folder, entries, cluster)
        return _result(plan, None) | {"dry_run": True, "going": _going(plan)}
    with exclusive(folder), _workers(folder, cluster):
        _sweep(folder)
        ended = _end_interrupted(folder, cluster)
        plan = planned(folder, entries, cluster)
        if not plan.removed and _are_known(folder, plan.entries):
            return _result(plan, None, ended)
        number = max(tombstones.numbers(folder), default=0) + 1
        now = datetime.now(UTC).isoformat(timespec="seconds")
        totals = totals_after(Manifest.existing(folder), plan)
        tombstone = Tombstone(number, now, reason, plan.entries, plan.removed, totals)
        tombstones.write(folder, tombstone)
        _carry_out(folder, tombstone, cluster)
    return _result(plan, tombstone)


def _workers(folder: Folder, cluster: ClusterConfig) -> AbstractContextManager[Any]:
    """Start Ray once for all that is to be done, if there is enough of it."""
    shards = len(committed(folder / RAW)) + len(committed(folder / FINAL))
    return session(cluster) if shards > FEW_TASKS else nullcontext()


def _sweep(folder: Folder) -> None:
    for name in (PLAN, RAW, f"{RAW}/{RETRY}", DEDUP, f"{DEDUP}/{SIGNATURES}", FINAL, TOMBSTONES):
        (folder / name).sweep_temporary()
    folder.sweep_temporary()


def _are_known(folder: Folder, entries: Sequence[Entry]) -> bool:
    known = {entry for number in tombstones.numbers(folder) for entry in tombstones.read(folder, number).entries}
    return known >= set(entries)


def _end_interrupted(folder: Folder, cluster: ClusterConfig) -> Tombstone | None:
    number = tombstones.open_number(folder)
    if number is None:
        return None
    ended = tombstones.read(folder, number)
    log.warning("remove: ending the removal of %s first, which was interrupted", folder.path(ended.name))
    _carry_out(folder, ended, cluster)
    return ended


def _carry_out(folder: Folder, tombstone: Tombstone, cluster: ClusterConfig) -> None:
    """Do all that a tombstone says is to be done; what is done already stays as it is."""
    tasks = tasks_of(folder, tombstone)
    places: dict[str, dict[str, list[int]]] = {RAW: {}, FINAL: {}}
    with progress("remove", len(tasks), "shards") as meter:
        for (stage, shard, _), found in few_or_on_ray(TakeDown, (folder.url, tombstone.name), tasks, cluster):
            if stage in places:
                places[stage][shard] = found
            meter.advance(1)
    _shorten_lists(folder, [one.key for one in tombstone.removed])
    for stage, shards in places.items():
        update_index(folder / stage, sorted(shards))
    Manifest.existing(folder).amend(tombstone.totals)
    done = {
        stage: {shard: found for shard, found in sorted(shards.items()) if found} for stage, shards in places.items()
    }
    tombstones.finish(folder, tombstone.number, done)


def _shorten_lists(folder: Folder, keys: Sequence[str]) -> None:
    """Take what goes out of dedup's lists: where it is a duplicate, what others went for, or in a pair to look at."""
    removed = removals(folder)
    if removed is not None:
        then = outlook(folder, bereft(removed, keys))
        _rewrite(folder, REMOVED, removed, without(removed, keys, then, is_laid_out(folder)))
    if (folder / DEDUP).exists(THRESHOLDS):
        table = left = pq.read_table(io.BytesIO((folder / DEDUP).read(THRESHOLDS)))
        for column in ("key", "other_key"):
            left = left.filter(pc.invert(pc.is_in(left[column], pa.array(keys, pa.string()))))
        _rewrite(folder, THRESHOLDS, table, left)


def _rewrite(folder: Folder, name: str, before: pa.Table, after: pa.Table) -> None:
    if not after.equals(before):
        buffer = io.BytesIO()
        pq.write_table(after, buffer, compression="zstd")
        (folder / DEDUP).write(name, buffer.getvalue())


def _result(plan: Plan, tombstone: Tombstone | None, ended: Tombstone | None = None) -> dict[str, Any]:
    removed = plan.removed if ended is None else ended.removed
    shown = tombstone or ended
    return {
        "samples": len(removed),
        "shards": {
            RAW: len({one.shard for one in removed if one.shard is not None}),
            FINAL: len({one.final_shard for one in removed if one.final is not None}),
        },
        "unmatched": list(plan.unmatched) if ended is None else [],
        "unhashed": plan.unhashed,
        "back": len(plan.then.back),
        "left_out": plan.left_out,
        "copies_left": sorted(set(plan.copies_left.values()), key=int),
        "tombstone": shown.name if shown is not None else None,
    }


def _going(plan: Plan) -> list[dict[str, Any]]:
    return [
        {
            "key": one.key, "raw_shard": one.shard, "final_key": one.final,
            "final_shard": one.final_shard, "matched": plan.shown[one.key],
            "sha256": plan.digests[one.key][0], "phash": plan.digests[one.key][1],
            "copy_left": plan.copies_left.get(one.key),
        }
        for one in plan.removed
    ]  # fmt: skip
