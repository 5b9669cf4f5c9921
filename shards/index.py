"""index.parquet: where every sample of a shard folder lies, so that no tar is opened to find one."""

from __future__ import annotations

import io
import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import UserError
from infra.logs import log, progress
from infra.storage import Folder
from shards import entries
from shards.entries import SCHEMA
from shards.layout import FORMAT_VERSION, INDEX, STATS_SUFFIX, by_number
from shards.scan import file_digest, scan_ends, sidecar_ends
from shards.tar import BLOCK_BYTES
from shards.writer import committed

SHARDS_PER_GROUP = 64
MOST_THREADS = 8
ENDS_HELD = 1 << 25
"""Most sample addresses kept in memory (4 bytes each); beyond that, row groups come and go."""


@dataclass(frozen=True)
class Shard:
    """One shard's entry: how many samples it holds, the number of the first, sizes in bytes, digests."""

    name: str
    samples: int
    first_sample: int
    tar_bytes: int
    tar_sha256: str | None = None
    sidecar_bytes: int | None = None
    sidecar_sha256: str | None = None

    @property
    def tar(self) -> str:
        """The tar's file name."""
        return f"{self.name}.tar"


class Index:
    """The shards of a folder and the address of each sample. Picklable, so loader workers get it whole."""

    def __init__(
        self,
        shards: list[Shard],
        ends: list[npt.NDArray[np.int64]] | None,
        source: bytes = b"",
        where: str = "",
        starts: Sequence[int] | None = None,
        *,
        checked: bool = False,
    ) -> None:
        """Hold `shards`, their addresses being `ends`, or in the parquet file whose bytes are `source`.

        `where` is the file's place; `starts` tells which shard each of its row groups begins with, by default every
        64th. With `checked`, addresses that cannot be are refused.
        """
        self.shards = shards
        self._source, self._where, self._checked = source, where, checked
        self._starts = list(range(0, len(shards), SHARDS_PER_GROUP)) if starts is None else list(starts)
        self._first = [shard.first_sample for shard in shards]
        self._groups: OrderedDict[int, list[npt.NDArray[np.uint32]]] = OrderedDict()
        self._locks: dict[int, threading.Lock] = {}
        if ends is not None:
            for start in range(0, len(ends), SHARDS_PER_GROUP):
                self._groups[start // SHARDS_PER_GROUP] = [
                    _blocks(one) for one in ends[start : start + SHARDS_PER_GROUP]
                ]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_locks": {}}

    @property
    def samples(self) -> int:
        """Samples in the folder."""
        return self.shards[-1].first_sample + self.shards[-1].samples if self.shards else 0

    @property
    def tar_bytes(self) -> int:
        """Bytes of all tars."""
        return sum(shard.tar_bytes for shard in self.shards)

    def ends(self, number: int, first: int = 0, stop: int | None = None) -> npt.NDArray[np.int64]:
        """Return where samples `[first, stop)` (all by default) of the `number`-th shard end in its tar, in bytes.

        Any number of threads may ask.

        Raises:
            UserError: the index gives places that cannot be, or its bytes are damaged.
        """
        group = bisect_right(self._starts, number) - 1
        place = number - self._starts[group]
        # A lock for each process: one that was held when a loader worker was forked would stay held there.
        with self._locks.setdefault(os.getpid(), threading.Lock()):
            held = self._groups.get(group)
            if held is None:
                held = self._groups[group] = self._load(group)
                while self._source and len(self._groups) > 1 and self._held() > ENDS_HELD:
                    self._groups.popitem(last=False)
            elif self._source:
                self._groups.move_to_end(group)
        return held[place][first:stop].astype(np.int64) * BLOCK_BYTES

    def shard_of(self, sample: int) -> int:
        """Return the place in `shards` of the one that holds `sample`."""
        return bisect_right(self._first, sample) - 1

    def pieces(self, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Cut samples `[first, stop)` at shard boundaries; yield (shard, first row, row after last)."""
        while first < stop:
            number = self.shard_of(first)
            shard = self.shards[number]
            end = min(stop, shard.first_sample + shard.samples)
            yield number, first - shard.first_sample, end - shard.first_sample
            first = end

    def table(self, start: int, stop: int) -> pa.Table:
        """Return the entries of shards `[start, stop)` as a table of `SCHEMA`."""
        rows = [
            {
                "shard": shard.name, "samples": shard.samples, "first_sample": shard.first_sample,
                "tar_bytes": shard.tar_bytes, "tar_sha256": shard.tar_sha256,
                "sidecar_bytes": shard.sidecar_bytes, "sidecar_sha256": shard.sidecar_sha256,
                "ends": self.ends(number),
            }
            for number, shard in enumerate(self.shards[start:stop], start)
        ]  # fmt: skip
        return pa.Table.from_pylist(rows, schema=SCHEMA)

    def _held(self) -> int:
        return sum(len(ends) for group in self._groups.values() for ends in group)

    def _load(self, group: int) -> list[npt.NDArray[np.uint32]]:
        start, stop = (*self._starts, len(self.shards))[group : group + 2]
        try:
            found = entries.ends_of(entries.opened(self._source), group, stop - start)
        except entries.DAMAGES as error:
            what = " ".join(str(error).split())
            raise UserError(
                f"{self._where}: the addresses of shard {self.shards[start].name} cannot be read ({what}); "
                "build the index anew with `pairmill index` on its folder"
            ) from None
        for shard, ends in zip(self.shards[start:stop], found, strict=True):
            if self._checked and not _are_places(ends, shard.samples, shard.tar_bytes):
                raise UserError(
                    f"{self._where}: the addresses of shard {shard.name} cannot be right; "
                    "build the index anew with `pairmill index` on its folder"
                )
        return [_blocks(ends) for ends in found]


def load(folder: Folder, *, checked: bool = True) -> Index:
    """Read `index.parquet`; `checked` refuses one that contradicts itself.

    Raises:
        UserError: there is none, it is of another format version, it contradicts itself, or it is not an index at
            all.
    """
    where = folder.path(INDEX)
    try:
        source = folder.read(INDEX)
    except FileNotFoundError:
        raise UserError(f"{where}: no such index; make one with `pairmill index {folder.url}`") from None
    try:
        file = entries.opened(source)
        version = entries.version_of(file)
        if version != str(FORMAT_VERSION):
            raise UserError(
                f"{where}: index of format version {version}, this version reads {FORMAT_VERSION}; "
                f"update pairmill, or build the index anew with `pairmill index {folder.url}`"
            )
        rows, groups = entries.rows_of(file)
    except entries.DAMAGES as error:
        raise UserError(
            f"{where}: not an index ({' '.join(str(error).split())}); build it anew with `pairmill index {folder.url}`"
        ) from None
    first = 0
    for row in rows:
        folder.path(f"{row['shard']}.tar")  # raises for a name that climbs out
        row["name"] = row.pop("shard")
        if checked and (row["first_sample"] != first or row["samples"] < 0):
            raise UserError(
                f"{where}: shard {row['name']} begins at sample {row['first_sample']}, it should at {first}; "
                f"build the index anew with `pairmill index {folder.url}`"
            )
        first += row["samples"]
    starts = [0, *accumulate(groups[:-1])]
    return Index([Shard(**row) for row in rows], None, source, where, starts, checked=checked)


def load_or_scan(folder: Folder) -> Index:
    """Read the folder's index; where there is none, find the samples in the tars and say so in the log.

    Raises:
        UserError: as `load`, or there is no shard in the folder.
    """
    if folder.exists(INDEX):
        index = load(folder)
    else:
        log.warning(
            "%s: no %s; finding the samples in sidecars and tars, as every start will until `pairmill index %s` has "
            "written one", folder.url, INDEX, folder.url,
        )  # fmt: skip
        index = build(folder)
    if not index.shards:
        raise UserError(f"{folder.url}: no shards here (no committed .tar files); name a shard folder")
    return index


def save(folder: Folder, index: Index) -> None:
    """Write `index.parquet`, the same bytes for the same shards."""
    buffer = io.BytesIO()
    with pq.ParquetWriter(
        buffer, SCHEMA, compression="zstd", use_dictionary=False, write_page_checksum=True,
        column_encoding={"ends.list.element": "DELTA_BINARY_PACKED"},
    ) as writer:  # fmt: skip
        for start in range(0, len(index.shards), SHARDS_PER_GROUP):
            writer.write_table(index.table(start, start + SHARDS_PER_GROUP))
    folder.write(INDEX, buffer.getvalue())


def shard_names(folder: Folder) -> list[str]:
    """Return the folder's shards in order: the committed ones; all tars where no commit is."""
    return committed(folder) or sorted((name.removesuffix(".tar") for name in folder.names(".tar")), key=by_number)


def build(folder: Folder, *, names: list[str] | None = None, digests: bool = False) -> Index:
    """Index every shard of a folder (or those of `names`): from its sidecar where that tells offsets, else by
    a scan of its tar.

    `digests` has tars without a commit of ours read whole for their SHA-256.

    Raises:
        UserError: a tar is missing or damaged; the message names it and the byte.
    """
    names = shard_names(folder) if names is None else names
    stats_of = set(folder.names(STATS_SUFFIX))

    def entry(name: str) -> tuple[Shard, npt.NDArray[np.int64]]:
        stats = folder.read_json(name + STATS_SUFFIX) if name + STATS_SUFFIX in stats_of else {}
        return _entry(folder, name, stats, digests)

    shards: list[Shard] = []
    ends: list[npt.NDArray[np.int64]] = []
    first = 0
    with (
        progress("index", len(names), "shards") as meter,
        ThreadPoolExecutor(min(MOST_THREADS, 2 * (os.cpu_count() or 1))) as pool,
    ):
        for shard, found in pool.map(entry, names):
            shards.append(replace(shard, first_sample=first))
            ends.append(found)
            first += len(found)
            meter.advance(samples=first)
    return Index(shards, ends)


def _entry(folder: Folder, name: str, stats: dict[str, Any], digests: bool) -> tuple[Shard, npt.NDArray[np.int64]]:
    tar = f"{name}.tar"
    is_ours = "tar_sha256" in stats
    try:
        tar_bytes = folder.size(tar)
    except FileNotFoundError:
        raise UserError(f"{folder.path(tar)}: this shard is missing; make or fetch it again") from None
    if is_ours and tar_bytes != stats.get("tar_bytes", tar_bytes):
        raise UserError(
            f"{folder.path(tar)}: this shard has {tar_bytes} bytes where its commit says {stats['tar_bytes']}; "
            f"make or fetch it again, see `pairmill verify {folder.url}`"
        )
    found = sidecar_ends(folder, name, tar_bytes) if is_ours else None
    if found is None:
        found = scan_ends(folder, name)
    digest = stats.get("tar_sha256") or (file_digest(folder, tar) if digests else None)
    return Shard(name, len(found), 0, tar_bytes, digest, stats.get("sidecar_bytes"), stats.get("sidecar_sha256")), found


def _are_places(ends: npt.NDArray[np.int64], samples: int, tar_bytes: int) -> bool:
    """Tell whether `ends` may be where so many samples of a tar of this size end."""
    return (
        len(ends) == samples
        and not (ends % BLOCK_BYTES).any()
        and bool((np.diff(ends, prepend=0) > 0).all())
        and (not samples or int(ends[-1]) <= tar_bytes)
    )


def _blocks(ends: npt.NDArray[np.int64]) -> npt.NDArray[np.uint32]:
    return (ends // BLOCK_BYTES).astype(np.uint32)
