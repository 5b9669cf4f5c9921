"""Reads every byte of a shard folder and checks it against sidecars, commits, index and digests."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from infra.errors import RunError, UserError
from infra.logs import progress
from infra.storage import TEMPORARY_PREFIX, Folder
from shards import index
from shards.check import Fault, Found, check_shard
from shards.layout import FINAL, INDEX, STATS_SUFFIX, by_number
from shards.writer import committed

MOST_THREADS = 4
__all__ = ["Fault", "VerifyReport", "verify"]


@dataclass
class VerifyReport:
    """What `verify` found: how much was read, and every fault. Of the `samples`, `holes` were taken down."""

    folder: str
    shards: int = 0
    samples: int = 0
    holes: int = 0
    bytes: int = 0
    quick: bool = False
    faults: list[Fault] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether there is no fault."""
        return not self.faults

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values: `shards`, `samples`, `holes`, `bytes`, `quick`, `faults`."""
        return {
            "shards": self.shards,
            "samples": self.samples,
            "holes": self.holes,
            "bytes": self.bytes,
            "quick": self.quick,
            "faults": [vars(fault) for fault in self.faults],
        }


def verify(folder: str | Folder, quick: bool = False) -> VerifyReport:
    """Check a shard folder: raw/, final/, or any folder of webdataset tars.

    `quick` compares names, sizes and the index alone and opens no tar.

    Raises:
        UserError: there is no such folder, or no shard and no index in it.
    """
    place = folder if isinstance(folder, Folder) else Folder(folder)
    if not place.exists():
        raise UserError(f"{place.url}: no such folder")
    report = VerifyReport(place.url, quick=quick)
    there = place.names()
    commits = committed(place)
    names = commits or index.shard_names(place)
    if not names and INDEX not in there:
        raise UserError(f"{place.url}: no shards here (no committed .tar files); name a shard folder")
    report.faults += _strangers(place, there, set(names), bool(commits))
    found: list[Found] = []
    with progress("verify", len(names), "shards") as meter, ThreadPoolExecutor(_threads()) as pool:
        for shard in pool.map(lambda name: check_shard(place, name, quick), names):
            found.append(shard)
            report.faults += shard.faults
            report.holes += shard.holes
            report.samples, report.bytes = report.samples + shard.samples, report.bytes + shard.tar_bytes
            meter.advance(samples=report.samples, faults=len(report.faults))
    report.shards = len(names)
    report.faults += _index_faults(place, found, there)
    return report


def _threads() -> int:
    return min(MOST_THREADS, os.cpu_count() or 1)


def _strangers(folder: Folder, there: Sequence[str], shards: set[str], has_commits: bool) -> list[Fault]:
    """Name the files that belong to no committed shard, and what interrupted writers left."""
    faults = []
    for name in there:
        stem = name.removesuffix(STATS_SUFFIX).removesuffix(".tar").removesuffix(".parquet")
        if name == INDEX or name.startswith(".") or stem in shards:
            continue
        if name.endswith(".tar") and has_commits:
            faults.append(Fault(stem, "", f"{name} has no commit ({stem}{STATS_SUFFIX} is missing)", "torn"))
        elif name.endswith(".parquet") and f"{stem}.tar" in there:
            continue  # named with its tar
        elif has_commits:
            faults.append(Fault(stem, "", f"{name} belongs to no shard", "stranger"))
    if folder.is_local:
        for path in sorted(Path(folder.url).glob(f"{TEMPORARY_PREFIX}*")):
            faults.append(Fault("", "", f"{path.name} was left by an interrupted writer", "stranger"))
    return faults


def _index_faults(folder: Folder, found: Sequence[Found], there: Sequence[str]) -> list[Fault]:
    """Compare the index with the shards that are there."""
    if INDEX not in there:
        is_final = Path(folder.url).name == FINAL
        return [Fault("", "", f"{INDEX} is missing", "index")] if is_final else []
    try:
        told = index.load(folder, checked=False)
    except (UserError, RunError) as error:
        return [Fault("", "", str(error), "index")]
    faults = []
    by_name = {shard.name: place for place, shard in enumerate(told.shards)}
    first = 0
    for shard in found:
        place = by_name.pop(shard.name, None)
        if place is None:
            faults.append(Fault(shard.name, "", "is not in the index", "index"))
            continue
        if not any(fault.kind == "unreadable" for fault in shard.faults):
            faults += _entry_faults(told, place, shard)
    for name in by_name:
        faults.append(Fault(name, "", "is in the index and has no commit here: a missing shard", "missing"))
    for entry in told.shards:
        if entry.first_sample != first:
            what = f"the index counts its first sample as {entry.first_sample}, it is {first}"
            faults.append(Fault(entry.name, "", what, "index"))
        first = entry.first_sample + entry.samples
    if [shard.name for shard in told.shards] != sorted((shard.name for shard in told.shards), key=by_number):
        faults.append(Fault("", "", "the index does not hold the shards in order", "index"))
    return faults


def _entry_faults(told: index.Index, place: int, shard: Found) -> list[Fault]:
    entry = told.shards[place]
    compared: list[tuple[str, Any, Any]] = [
        ("samples", entry.samples, shard.samples),
        ("bytes in the tar", entry.tar_bytes, shard.tar_bytes),
        ("the tar's SHA-256", entry.tar_sha256, shard.tar_sha256),
        ("bytes in the sidecar", entry.sidecar_bytes, shard.sidecar_bytes),
        ("the sidecar's SHA-256", entry.sidecar_sha256, shard.sidecar_sha256),
    ]
    faults = [
        Fault(shard.name, "", f"{what}: {said} in the index, {is_there} there", "index")
        for what, said, is_there in compared
        if said is not None and is_there is not None and said != is_there
    ]
    try:
        ends = told.ends(place)
    except UserError as error:
        return [*faults, Fault(shard.name, "", str(error), "index")]
    if len(ends) != entry.samples:
        faults.append(
            Fault(shard.name, "", f"the index has {len(ends)} addresses for {entry.samples} samples", "index")
        )
    elif shard.ends is not None and not np.array_equal(ends, shard.ends):
        wrong = int(np.flatnonzero(ends[: len(shard.ends)] != shard.ends[: len(ends)])[:1].sum())
        faults.append(Fault(shard.name, "", f"the index has sample {wrong} at another place", "index"))
    return faults
