"""Which samples of a corpus a list of what is to go names: every sidecar is looked through once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from dedup.sidecars import columns_of
from infra.storage import Folder
from shards.barred import Barred, Entry, Kind
from shards.layout import (
    DEDUP,
    FINAL,
    RAW,
    RETRY,
    SIGNATURES,
    SOURCE_KEY,
    Status,
    key_address,
    part_number,
    shard_name,
)
from shards.urls import digest_of
from shards.writer import committed

COLUMNS = ("key", "status", "url", "final_url", "sha256", "phash", SOURCE_KEY)
ShardOf = tuple[str, str]
"""A stage with shards, and the name of one."""


@dataclass(frozen=True)
class Match:
    """A sample that is to go: its stage, shard and key there, its `raw_key`, and which of the entries it is of.

    `url` is its URL's digest (`shards.urls.digest_of`), `sha256` its body's, `phash` its PDQ hash; `by_own_hash`: it
    was found by a hash that dedup has made, and no sidecar has.
    """

    stage: str
    shard: str
    key: str
    raw_key: str
    entry: int
    url: str | None
    sha256: str | None
    phash: str | None
    by_own_hash: bool = False


class Matcher:
    """Looks through one shard's sidecar after another; a Ray actor holds one."""

    def __init__(self, corpus: str, entries: Sequence[Entry]) -> None:
        self.corpus = Folder(corpus)
        self.places = {entry: place for place, entry in reversed(list(enumerate(entries)))}
        self.barred = Barred(entries)

    def run(self, task: ShardOf) -> tuple[list[Match], int]:
        """Return the samples of a shard that are to go, and how many of its samples have no PDQ hash.

        Of raw samples whose sidecar has none, the one that dedup made counts.
        """
        stage, shard = task
        found, unhashed = [], 0
        hashes: dict[str, str] | None = None
        for row in samples(self.corpus / stage, shard):
            raw_key = row.get(SOURCE_KEY) or row["key"]
            lacks = row["phash"] is None and stage == RAW and self.barred.has_pictures
            if lacks:
                hashes = self._hashes(shard) if hashes is None else hashes
                row["phash"] = hashes.get(raw_key)
            unhashed += row["phash"] is None
            entry = self._entry(raw_key, row)
            if entry is not None:
                digests = digest_of(row["url"]), row["sha256"], row["phash"]
                by_own_hash = lacks and entry.kind == Kind.PDQ
                found.append(Match(stage, shard, row["key"], raw_key, self.places[entry], *digests, by_own_hash))
        return found, unhashed

    def _hashes(self, shard: str) -> dict[str, str]:
        """Return the PDQ hashes in the signatures of a raw shard, by raw key; none where dedup has not made them."""
        folder = self.corpus / DEDUP / SIGNATURES
        if not folder.exists(f"{shard}.parquet"):
            return {}
        table = columns_of(folder, shard, ("key", "phash"))
        values = zip(table["key"].to_pylist(), table["phash"].to_pylist(), strict=True)
        return {key: phash.hex() for key, phash in values if phash is not None}

    def _entry(self, raw_key: str, row: dict[str, Any]) -> Entry | None:
        barred = self.barred
        return (
            barred.row(raw_key, row["url"])
            or barred.url(row["final_url"])
            or barred.body(row["sha256"])
            or barred.picture(row["phash"])
        )


def samples(folder: Folder, shard: str) -> Iterator[dict[str, Any]]:
    """Yield the samples of a shard as its sidecar has them, with the columns that tell who they are.

    Raises:
        RunError: the sidecar is missing or damaged.
    """
    table = columns_of(folder, shard, COLUMNS)
    for batch in table.filter(pc.equal(table["status"], Status.SUCCESS.value)).to_batches():
        yield from batch.to_pylist()


def with_raw_keys(corpus: Folder, entries: Sequence[Entry], shards: Sequence[str]) -> list[Entry]:
    """Return the entries, those of keys in `final/` turned into those of the raw keys they were made of.

    One that names no sample there stays, and matches nothing.
    """
    wanted = {entry.value for entry in entries if entry.kind == Kind.FINAL}
    raw_of: dict[str, str] = {}
    for shard in sorted({shard_name(key_address(key)[0]) for key in wanted} & set(shards)):
        rows = columns_of(corpus / FINAL, shard, ("key", SOURCE_KEY)).to_pylist()
        raw_of |= {row["key"]: row[SOURCE_KEY] for row in rows if row["key"] in wanted}
    return [
        Entry(Kind.KEY, raw_of[entry.value], shown=entry.shown)
        if entry.kind == Kind.FINAL and entry.value in raw_of
        else entry
        for entry in entries
    ]


def raw_shards_of(corpus: Folder, keys: Iterable[str]) -> list[ShardOf]:
    """Return the raw shards that may hold the samples of these keys: their own, and those of retries."""
    numbers = {key_address(key)[0] for key in keys}
    if numbers:
        numbers |= {part_number(name) for name in (corpus / RAW / RETRY).names(".parquet")}
    there = set(committed(corpus / RAW))
    return [(RAW, name) for name in map(shard_name, sorted(numbers)) if name in there]


def all_shards(raw: Sequence[str], final: Sequence[str]) -> list[ShardOf]:
    """Return the tasks of a whole look."""
    return [(RAW, shard) for shard in raw] + [(FINAL, shard) for shard in final]
