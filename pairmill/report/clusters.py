"""Duplicates side by side: the sample that was kept beside those that went for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.storage import Folder
from pairmill.report.pictures import Album, Picture
from pairmill.report.rows import SEED, Source
from pairmill.report.wording import address, plain
from shards.layout import DEDUP, RAW, REMOVED, RETRY, key_address, part_number, shard_name

LARGEST, FARTHEST, CHANCE = 6, 4, 4
"""Clusters shown: the largest, those whose pictures lie farthest apart, and some by chance."""
MEMBERS = 6
"""Removed samples shown of a cluster."""
ROW_LIMIT = 2_000_000
"""Removals looked at; beyond that, the first so many."""

_COLUMNS = ("key", "caption", "url", "width", "height", "image_offset", "image_bytes")


@dataclass(frozen=True)
class Member:
    """One sample of a cluster; `method` and `distance` (bits of 256) for those removed."""

    caption: str
    host: str
    path: str
    pixels: str
    picture: Picture | None
    method: str = ""
    distance: int = 0


@dataclass(frozen=True)
class Cluster:
    """A kept sample, some of those removed for it, and how many more there are."""

    kept: Member
    removed: tuple[Member, ...]
    more: int


@dataclass(frozen=True)
class Duplicates:
    """Clusters to show; how many samples were looked at, in how many clusters."""

    clusters: tuple[Cluster, ...] = ()
    looked_at: int = 0
    groups: int = 0


def duplicates(corpus: Folder, album: Album, sources: list[Source]) -> Duplicates:
    """Return what `dedup` removed, side by side with what it kept; nothing if it has not run."""
    source, raw = Source(corpus / DEDUP), Source(corpus / RAW)
    if not source.folder.exists(REMOVED):
        return Duplicates()
    sources += [source, raw]
    table = _removals(source)
    if table is None or not table.num_rows:
        return Duplicates()
    groups = pc.value_counts(table["kept_key"])
    chosen = _chosen(table, groups)
    rows = {key: table.filter(pc.equal(table["kept_key"], key)).to_pylist() for key in chosen}
    shown = {key: sorted(rows[key], key=lambda row: (row["distance"], row["key"]))[-MEMBERS:] for key in chosen}
    found = members(raw, [*chosen, *(row["key"] for one in shown.values() for row in one)], album)
    clusters = tuple(
        Cluster(
            found[key],
            tuple(_removed(found[row["key"]], row) for row in shown[key]),
            len(rows[key]) - len(shown[key]),
        )
        for key in chosen
    )
    return Duplicates(clusters, table.num_rows, len(groups))


def _removals(source: Source) -> pa.Table | None:
    tables, rows = [], 0
    for table in source.tables(REMOVED, ("key", "kept_key", "method", "distance"), pieces=1 << 30):
        tables.append(table)
        rows += table.num_rows
        if rows >= ROW_LIMIT:
            break
    if not tables:
        return None
    table = pa.concat_tables(tables).slice(0, ROW_LIMIT)
    return table.filter(pc.is_valid(table["kept_key"]))  # others went for no sample, but for a test picture


def _chosen(table: pa.Table, groups: pa.StructArray) -> list[str]:
    """Return the kept keys of the clusters to show, each once."""
    keys = np.array(groups.field("values").to_pylist(), dtype=object)
    sizes = groups.field("counts").to_numpy()
    largest = keys[np.lexsort((keys.astype(str), -sizes))][:LARGEST].tolist()
    far = table.filter(pc.equal(table["method"], "perceptual")).select(["kept_key", "distance"])
    order = pc.sort_indices(far, sort_keys=[("distance", "descending"), ("kept_key", "ascending")])
    farthest = dict.fromkeys(far.take(order.slice(0, 20 * FARTHEST))["kept_key"].to_pylist())
    chosen = dict.fromkeys(largest)
    chosen.update(dict.fromkeys([key for key in farthest if key not in chosen][:FARTHEST]))
    by_chance = np.random.default_rng(SEED).permutation(np.sort(keys.astype(str))).tolist()
    chosen.update(dict.fromkeys([key for key in by_chance if key not in chosen][:CHANCE]))
    return list(chosen)


def members(raw: Source, keys: Sequence[str], album: Album) -> dict[str, Member]:
    """Return samples by key; the pictures are taken in the order of `keys`."""
    rows: dict[str, tuple[str, dict[str, Any]]] = {}
    for shard, numbers in _by_shard(keys):
        found = raw.rows_at(f"{shard}.parquet", numbers, _COLUMNS)
        rows.update({row["key"]: (shard, row) for row in found.values() if row.get("image_bytes")})
    rows |= _tried_again(raw, [key for key in keys if key not in rows])
    return {key: _member(raw, *rows[key], album) if key in rows else _unknown(key) for key in keys}


def _tried_again(raw: Source, keys: Sequence[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return those of `keys` that a later pass over failed rows made samples of, in shards of other names."""
    shards = [part_number(name) for name in (raw.folder / RETRY).names(".parquet")] if keys else []
    wanted, rows = pa.array(keys, pa.string()), {}
    for shard in map(shard_name, shards):
        for table in raw.tables(f"{shard}.parquet", _COLUMNS, pieces=1 << 30):
            for row in table.filter(pc.is_in(table["key"], wanted)).to_pylist():
                if row.get("image_bytes"):
                    rows[row["key"]] = (shard, row)
    return rows


def _by_shard(keys: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
    places: dict[int, list[int]] = {}
    for key in dict.fromkeys(keys):
        try:
            shard, row = key_address(key)
        except ValueError:
            continue
        places.setdefault(shard, []).append(row)
    for shard, numbers in sorted(places.items()):
        yield shard_name(shard), sorted(numbers)


def _member(raw: Source, shard: str, row: dict[str, Any], album: Album) -> Member:
    body = raw.picture(shard, row)
    caption = plain(row.get("caption"), 120)
    pixels = f"{row['width']} × {row['height']}" if row.get("width") and row.get("height") else ""
    return Member(caption, *address(row.get("url")), pixels, album.take(body, caption) if body else None)


def _unknown(key: str) -> Member:
    return Member(plain(key), "", "", "", None)


def _removed(member: Member, row: dict[str, Any]) -> Member:
    return Member(
        member.caption, member.host, member.path, member.pixels, member.picture,
        plain(row["method"], 20), int(row["distance"]),
    )  # fmt: skip
