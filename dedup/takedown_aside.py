"""What dedup set aside for samples that are taken down: copies go with them, other pictures must not be lost by it."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dedup.outcome import SEMANTIC, TEXT
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


def coming_back(lost: dict[str, tuple[str, str]]) -> dict[str, str]:
    """Return which of those that are `bereft` stay from now on, with the method by which they had gone.

    All of `semantic`; of a kept key's captions the one of the lowest key, in the place of the one that goes.
    """
    heirs = _heirs(lost)
    return {key: method for key, (kept, method) in lost.items() if method == SEMANTIC or heirs[kept] == key}


def is_laid_out(folder: Folder) -> bool:
    """Tell whether the places in `final/` are settled: one that came back would move all others."""
    return bool(Manifest.existing(folder).config(FINAL))


def without(removed: pa.Table, gone: Sequence[str], laid_out: bool) -> pa.Table:
    """Return `removed` without `gone`, and with no row that names one of them as kept but rows of copies.

    Who comes back has no row any more; where `final/` is laid out they all keep theirs, without a kept key.
    """
    lost = bereft(removed, gone)
    heirs, back = _heirs(lost), set() if laid_out else set(coming_back(lost))
    dropped = pa.array([*gone, *back], pa.string())
    left = removed.filter(pc.invert(pc.is_in(removed["key"], dropped))).combine_chunks()
    is_bereft = pc.is_in(left["key"], pa.array([key for key in lost if key not in back], pa.string()))
    if not pc.any(is_bereft).as_py():
        return left
    now = [None if laid_out else heirs[lost[key][0]] for key in left["key"].filter(is_bereft).to_pylist()]
    kept = left["kept_key"].combine_chunks()
    replaced = pc.replace_with_mask(kept, is_bereft.combine_chunks(), pa.array(now, pa.string()))
    return left.set_column(left.schema.get_field_index("kept_key"), left.schema.field("kept_key"), replaced)


def _heirs(lost: dict[str, tuple[str, str]]) -> dict[str, str]:
    """Return the lowest key of those that went by their captions, by the key they went for."""
    keys = sorted((key for key, (_, method) in lost.items() if method == TEXT), key=int, reverse=True)
    return {lost[key][0]: key for key in keys}


def _is_other(rows: pa.Table) -> pa.ChunkedArray:
    return pc.is_in(rows["method"], pa.array(OTHER_PICTURES, pa.string()))
