"""What dedup set aside for samples that are taken down: copies go with them, other pictures must not be lost by it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dedup.outcome import SEMANTIC, TEXT
from dedup.takedown_back import Goes, Outlook
from infra.storage import Folder
from shards.layout import DEDUP, FINAL, REMOVED
from shards.manifest import Manifest

OTHER_PICTURES = (SEMANTIC, TEXT)
"""Methods by which a sample goes for one that shows another picture."""


def removals(folder: Folder) -> pa.Table | None:
    """Return a corpus' `removed.parquet`; None without one."""
    place = folder / DEDUP
    return pq.read_table(io.BytesIO(place.read(REMOVED))) if place.exists(REMOVED) else None


def set_aside(removed: pa.Table, keys: Sequence[str]) -> pa.Table:
    """Return the rows of `removed` that are of none of `keys`, and went for one of them."""
    wanted = pa.array(keys, pa.string())
    return removed.filter(pc.and_(pc.is_in(removed["kept_key"], wanted), pc.invert(pc.is_in(removed["key"], wanted))))


def copies_left(removed: pa.Table, gone: Sequence[str]) -> dict[str, str]:
    """Return which of `gone` had gone for a copy that does not go itself, with that one's key."""
    rows = removed.filter(pc.is_in(removed["key"], pa.array(gone, pa.string())))
    rows = rows.filter(pc.and_(pc.is_valid(rows["kept_key"]), pc.invert(_is_other(rows))))
    kept = dict(zip(rows["key"].to_pylist(), rows["kept_key"].to_pylist(), strict=True))
    going = set(gone)
    return {key: copy for key, copy in kept.items() if copy not in going}


def bereft(removed: pa.Table, gone: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return the other pictures that went for one of `gone` and do not go themselves: kept key and method, by key."""
    rows = set_aside(removed, gone)
    rows = rows.filter(_is_other(rows)).select(["key", "kept_key", "method"]).to_pylist()
    return {row["key"]: (row["kept_key"], row["method"]) for row in rows}


def is_laid_out(folder: Folder) -> bool:
    """Tell whether the places in `final/` are settled: one that came back would move all others."""
    return bool(Manifest.existing(folder).config(FINAL))


def without(removed: pa.Table, gone: Sequence[str], then: Outlook, laid_out: bool) -> pa.Table:
    """Return `removed` without `gone`, and with no row that names one of them as kept but rows of copies.

    Args:
        removed: dedup's list.
        gone: the samples that go.
        then: what becomes of those that are `bereft` of them. Who comes back has no row any more, the others go for
            those.
        laid_out: all keep their rows, without a kept key.
    """
    dropped = pa.array([*gone, *([] if laid_out else then.back)], pa.string())
    left = removed.filter(pc.invert(pc.is_in(removed["key"], dropped))).combine_chunks()
    changed = pc.is_in(left["key"], pa.array(then.lost if laid_out else then.goes, pa.string())).combine_chunks()
    rows = left.filter(changed).to_pylist()
    if not rows:
        return left
    now = [{**row, "kept_key": None} if laid_out else {**row, **_changes(then.goes[row["key"]])} for row in rows]
    for place, field in enumerate(left.schema):
        values = pa.array([row[field.name] for row in now], field.type)
        column = pc.replace_with_mask(left[field.name].combine_chunks(), changed, values)
        left = left.set_column(place, field, column)
    return left


def _changes(goes: Goes) -> dict[str, Any]:
    changes = {"kept_key": goes.kept_key, "method": goes.method, "cosine": None}
    return changes if goes.distance is None else changes | {"distance": goes.distance}


def _is_other(rows: pa.Table) -> pa.ChunkedArray:
    return pc.is_in(rows["method"], pa.array(OTHER_PICTURES, pa.string()))
