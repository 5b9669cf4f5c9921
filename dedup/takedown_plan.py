"""What a list comes to in a corpus: which samples go, and what the stages' totals are without them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from dedup.spread import few_or_on_ray
from dedup.statistics import without
from dedup.takedown_aside import OTHER_PICTURES, bereft, copies_left, is_laid_out, removals, set_aside
from dedup.takedown_back import Outlook, outlook
from dedup.takedown_match import Match, Matcher, ShardOf, all_shards, raw_shards_of, with_raw_keys
from infra.cluster import ClusterConfig
from infra.logs import progress
from infra.storage import Folder
from shards.barred import Entry, Kind
from shards.layout import DEDUP, FINAL, RAW, REMOVED, Reason, Status
from shards.manifest import Manifest
from shards.selection import reason_of, removed_of
from shards.tombstones import Removed
from shards.writer import committed


@dataclass(frozen=True)
class Plan:
    """What a list comes to in a corpus: the samples that go, entries that name none, samples without a PDQ hash.

    `digests` are of the samples' bodies and pictures (SHA-256, PDQ hash), `shown` is what each matched as a person
    wrote it, for who looks before anything goes: a tombstone has no address. `then` is what becomes of other pictures
    that had gone for them; `left_out` counts those who would come back, were `final/` not laid out, and `then` is of
    nobody. `copies_left` are samples that stay and that one that goes had gone for, as a copy, by its key.
    """

    entries: tuple[Entry, ...]
    removed: tuple[Removed, ...]
    methods: Mapping[str, str]
    unmatched: tuple[str, ...]
    unhashed: int
    digests: Mapping[str, tuple[str | None, str | None]]
    shown: Mapping[str, str]
    then: Outlook
    left_out: int
    copies_left: Mapping[str, str]


def planned(folder: Folder, given: Sequence[Entry], cluster: ClusterConfig) -> Plan:
    """Look through every sidecar for what the entries name. Raises RunError for one that cannot be read."""
    final = committed(folder / FINAL)
    entries = with_raw_keys(folder, given, final)
    matches, unhashed = _matches(folder, entries, final, cluster)
    keys = sorted({one.raw_key for one in matches}, key=int)
    aside = removals(folder) if keys else None
    copies, also = _copies(folder, aside, matches, keys, cluster)
    methods = removed_of(folder, sorted({*keys, *copies})) if (folder / DEDUP).exists(REMOVED) else {}
    manifest = Manifest.existing(folder)
    told = _told({one.raw_key: str(entries[one.entry]) for one in matches}, copies)
    removed = _removed(manifest, [*matches, *also], methods, told)
    named = {one.entry for one in matches}
    then = outlook(folder, {} if aside is None else bereft(aside, [one.key for one in removed]))
    laid_out = is_laid_out(folder)
    return Plan(
        tuple(dict.fromkeys(entry for entry in entries if entry.kind != Kind.FINAL)),
        removed,
        methods,
        tuple(entry.shown for place, entry in enumerate(entries) if place not in named),
        unhashed if any(entry.kind == Kind.PDQ for entry in entries) else 0,
        _digests((*matches, *also)),
        _told({one.raw_key: entries[one.entry].shown for one in matches}, copies),
        Outlook({}, {}) if laid_out else then,
        len(then.back) if laid_out else 0,
        {} if aside is None else copies_left(aside, [one.key for one in removed]),
    )


def _told(words: Mapping[str, str], copies: Mapping[str, str]) -> dict[str, str]:
    return {**words, **{key: f"duplicate of {kept}, {words[kept]}" for key, kept in copies.items()}}


def _digests(matches: Sequence[Match]) -> dict[str, tuple[str | None, str | None]]:
    found: dict[str, tuple[str | None, str | None]] = {}
    for one in matches:
        sha256, phash = found.get(one.raw_key, (None, None))  # a final sidecar has no hash that dedup alone has made
        found[one.raw_key] = sha256 or one.sha256, phash or one.phash
    return found


def _matches(
    folder: Folder, entries: Sequence[Entry], final: Sequence[str], cluster: ClusterConfig
) -> tuple[list[Match], int]:
    """Return all that the entries name, and how many samples no `pdq` entry can be compared with.

    A raw sample's hash may be in dedup's signatures alone: what became of it in `final/` is then found by its key.
    """
    matches, unhashed = _found(folder, entries, all_shards(committed(folder / RAW), final), cluster)
    there = {one.raw_key for one in matches if one.stage == FINAL}
    lone = {one.raw_key: one.entry for one in matches if one.by_own_hash}
    lone = {key: entry for key, entry in lone.items() if key not in there}
    in_final, _ = _found(folder, [Entry(Kind.KEY, key) for key in lone], all_shards((), final), cluster)
    return matches + [replace(one, entry=lone[one.raw_key]) for one in in_final], unhashed


def _found(
    folder: Folder, entries: Sequence[Entry], tasks: Sequence[ShardOf], cluster: ClusterConfig
) -> tuple[list[Match], int]:
    matches: list[Match] = []
    unhashed = 0
    if not entries or not tasks:
        return matches, unhashed
    with progress("remove: looking", len(tasks), "shards") as meter:
        for (stage, _), (found, without) in few_or_on_ray(Matcher, (folder.url, entries), tasks, cluster):
            matches += found
            unhashed += without if stage == tasks[0][0] else 0  # in `final/` they are the same samples once more
            meter.advance(1, samples=len(matches))
    return matches, unhashed


def _copies(
    folder: Folder, removed: pa.Table | None, matches: Sequence[Match], keys: Sequence[str], cluster: ClusterConfig
) -> tuple[dict[str, str], list[Match]]:
    """Return the copies that dedup set aside for one of `keys`, with that one, by key, and where they are.

    `removed` is dedup's list. In `final/` they have no place: were they left, the next dedup would bring the picture
    back by one of them. Other pictures are none, unless they have the very body.
    """
    if removed is None:
        return {}, []
    rows = {row["key"]: row for row in set_aside(removed, keys).select(["key", "kept_key", "method"]).to_pylist()}
    found, _ = _found(folder, [Entry(Kind.KEY, key) for key in rows], raw_shards_of(folder, rows), cluster)
    bodies = {one.sha256 for one in matches if one.sha256}
    also = [one for one in found if rows[one.raw_key]["method"] not in OTHER_PICTURES or one.sha256 in bodies]
    return {one.raw_key: rows[one.raw_key]["kept_key"] for one in also}, also


def _removed(
    manifest: Manifest, matches: Sequence[Match], methods: Mapping[str, str], told: Mapping[str, str]
) -> tuple[Removed, ...]:
    """Return a record of each sample, by its key in `raw/`; `told` is what it matched."""
    stages: defaultdict[str, dict[str, Match]] = defaultdict(dict)
    for match in matches:
        stages[match.raw_key][match.stage] = match
    is_being_laid_out = bool(manifest.config(FINAL)) and not manifest.is_done(FINAL)
    found = []
    for key in sorted(stages, key=int):
        raw, final = stages[key].get(RAW), stages[key].get(FINAL)
        one = next(iter(stages[key].values()))
        found.append(
            Removed(
                key=key,
                shard=raw.shard if raw else None,
                final=final.key if final else None,
                placed=final is not None or (is_being_laid_out and key not in methods),
                url=one.url,
                sha256=one.sha256,
                matched=told[key],
            )
        )
    return tuple(found)


def totals_after(manifest: Manifest, plan: Plan) -> dict[str, dict[str, Any]]:
    """Return the totals of the stages that are done, as they are without what goes.

    In `raw/` the rows count as filtered; the stages after it have never had them in. What dedup says of distances,
    components and test sets stays as it found it, with the number of samples that were `taken_down` since.
    """
    gone, final = len(plan.removed), sum(one.final is not None for one in plan.removed)
    duplicates = Counter(reason_of(plan.methods[one.key]) for one in plan.removed if one.key in plan.methods)
    found: dict[str, dict[str, Any]] = {}
    for stage in (RAW, DEDUP, FINAL):
        totals = manifest.totals(stage)
        if not manifest.is_done(stage) or "by_status" not in totals:
            continue
        if stage == RAW:
            totals |= _moved(totals, gone, -gone, Counter({Reason.TAKEN_DOWN.value: -gone}))
        else:
            kept = final if stage == FINAL else gone - duplicates.total()
            totals["rows_in"] -= kept + duplicates.total()
            totals |= _moved(totals, kept, duplicates.total(), duplicates)
        for name, less in (("kept", gone - duplicates.total()), ("removed", duplicates.total()), ("samples", final)):
            if name in totals:
                totals[name] -= less
        if stage == DEDUP:
            totals |= _come_back(totals, plan.then)
            totals["taken_down"] = totals.get("taken_down", 0) + gone
        if "largest_components" in totals:
            totals["largest_components"] = without(totals["largest_components"], {one.key for one in plan.removed})
        if stage == FINAL and final:
            totals["holes"] = totals.get("holes", 0) + final
        found[stage] = totals
    return found


def _come_back(totals: Mapping[str, Any], then: Outlook) -> dict[str, Any]:
    back, reasons = len(then.back), Counter(reason_of(method) for _, method in then.lost.values())
    reasons.subtract(reason_of(goes.method) for goes in then.goes.values())
    counts = {"kept": totals["kept"] + back, "removed": totals["removed"] - back}
    return counts | _moved(totals, -back, back, reasons)


def _moved(totals: Mapping[str, Any], kept: int, filtered: int, reasons: Mapping[str, int]) -> dict[str, Any]:
    """Return `by_status` and `by_reason` of totals with so many fewer samples, and rows filtered."""
    statuses = Counter(totals["by_status"])
    statuses.subtract({Status.SUCCESS.value: kept, Status.FILTERED.value: filtered})
    by_reason = Counter(totals.get("by_reason", {}))
    by_reason.subtract(reasons)
    return {
        name: {one: count for one, count in sorted(counts.items()) if count}
        for name, counts in (("by_status", statuses), ("by_reason", by_reason))
    }
