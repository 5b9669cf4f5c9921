"""Pairs at dedup's thresholds and just beyond them, side by side: what a person chooses the thresholds by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from infra.storage import Folder
from pairmill.report.clusters import Member, members
from pairmill.report.pictures import Album
from pairmill.report.rows import Source, even
from shards.layout import DEDUP, RAW, THRESHOLDS
from shards.manifest import Manifest

SHOWN = 15
"""Pairs shown of each method and side."""

_COLUMNS = ("key", "other_key", "method", "side", "distance", "cosine", "same")
_SIDES = ("within", "beyond")


@dataclass(frozen=True)
class Pair:
    """Two samples, how far apart they are in words, and what the second look said of them, if there was one."""

    one: Member
    other: Member
    gap: str
    look: str


@dataclass(frozen=True)
class Threshold:
    """The pairs on both sides of one threshold; `option` sets it, and who wants fewer pairs makes it `stricter`."""

    title: str
    option: str
    value: str
    stricter: str
    looser: str
    within: tuple[Pair, ...]
    beyond: tuple[Pair, ...]


def thresholds(corpus: Folder, manifest: Manifest, album: Album, sources: list[Source]) -> list[Threshold]:
    """Return the thresholds that pairs were drawn at; none where there are no pairs, or dedup drew none."""
    source, raw = Source(corpus / DEDUP), Source(corpus / RAW)
    if not source.folder.exists(THRESHOLDS):
        return []
    sources += [source, raw]
    tables = list(source.tables(THRESHOLDS, _COLUMNS, pieces=1 << 30))
    table = pa.concat_tables(tables) if tables else None
    if table is None or not set(_COLUMNS) <= set(table.column_names):
        return []
    rows = {
        (method, side): even(
            [row for row in table.to_pylist() if (row["method"], row["side"]) == (method, side)], SHOWN
        )
        for method in ("perceptual", "semantic")
        for side in _SIDES
    }
    keys = [row[name] for some in rows.values() for row in some for name in ("key", "other_key")]
    found = members(raw, keys, album)
    pairs = {at: tuple(_pair(row, found) for row in some) for at, some in rows.items()}
    config = manifest.config(DEDUP)
    made = (_perceptual(config, pairs), _semantic(config, pairs))
    return [one for one in made if one.within or one.beyond]


Pairs = dict[tuple[str, str], tuple[Pair, ...]]


def _perceptual(config: dict[str, Any], pairs: Pairs) -> Threshold:
    sides = (pairs["perceptual", side] for side in _SIDES)
    value = f"{config['distance']} bits" if "distance" in config else ""
    return Threshold("By their look", "--distance", value, "lower", "raise", *sides)


def _semantic(config: dict[str, Any], pairs: Pairs) -> Threshold:
    sides = (pairs["semantic", side] for side in _SIDES)
    known = config.get("semantic", {}).get("threshold")
    value = f"a cosine of {known:g}" if known is not None else ""
    return Threshold("By their embeddings", "--semantic.threshold", value, "raise", "lower", *sides)


def _pair(row: dict[str, Any], found: dict[str, Member]) -> Pair:
    bits, cosine = row["distance"], row["cosine"]
    gap = f"{bits} bit{'' if bits == 1 else 's'} apart" if bits is not None else f"cosine {cosine:.3f}"
    look = {True: "second look: same", False: "second look: another", None: ""}[row["same"]]
    return Pair(found[row["key"]], found[row["other_key"]], gap, look)
