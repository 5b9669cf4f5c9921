"""Contact sheets: kept samples, and rejected rows by reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.storage import Folder
from pairmill.report.accounting import status_of
from pairmill.report.pictures import Album, Picture
from pairmill.report.rows import SEED, Source, even
from pairmill.report.wording import address, plain, reason
from shards.layout import FINAL, PLAN, RAW, Status
from shards.writer import committed

KEPT_PICTURES = 72
KEPT_SHARDS, REJECTED_SHARDS = 36, 64
"""Shards looked into at most."""
HANDFUL = 4
"""Rows shown for each reason."""
REASONS_SHOWN = 40

_KEPT_COLUMNS = ("status", "caption", "url", "width", "height", "image_offset", "image_bytes")
_REJECTED_COLUMNS = (
    "status", "reason", "url", "caption", "detail", "opt_out", "original_width", "original_height",
)  # fmt: skip
_FRAME_PX = 60


@dataclass(frozen=True)
class Card:
    """One row on a sheet; `frame` (width, height in pixels) draws the shape of a picture that was not stored."""

    caption: str
    host: str
    path: str
    detail: str = ""
    picture: Picture | None = None
    frame: tuple[int, int] | None = None


@dataclass(frozen=True)
class Sheet:
    """Cards of rows rejected for one reason; `count` is how many there are in all."""

    reason: str
    words: str
    tone: str
    stage: str
    count: int
    cards: tuple[Card, ...]


def kept(corpus: Folder, album: Album, sources: list[Source]) -> tuple[list[Card], bool]:
    """Return kept samples chosen evenly over all shards, and whether they are final ones (else raw, so far)."""
    for name in (FINAL, RAW):
        source = Source(corpus / name)
        shards = committed(source.folder)
        if shards:
            sources.append(source)
            return list(_kept_of(source, shards, album)), name == FINAL
    return [], False


def _kept_of(source: Source, shards: list[str], album: Album) -> Iterator[Card]:
    chosen = even(shards, KEPT_SHARDS)
    for number, shard in enumerate(chosen):
        wanted = KEPT_PICTURES * (number + 1) // len(chosen) - KEPT_PICTURES * number // len(chosen)
        rng = np.random.default_rng([SEED, int(shard) if shard.isdigit() else number])
        for row in _choose(source, shard, wanted, rng):
            body = source.picture(shard, row)
            caption = plain(row["caption"])
            picture = album.take(body, caption) if body else None
            if picture is not None:
                yield Card(caption, *address(row["url"]), picture=picture)


def _choose(source: Source, shard: str, wanted: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    tables = list(source.tables(f"{shard}.parquet", _KEPT_COLUMNS))
    if not tables:
        return []
    table = pa.concat_tables(tables)
    rows = np.flatnonzero(pc.equal(table["status"], Status.SUCCESS.value).to_numpy(zero_copy_only=False))
    picked = np.sort(rng.permutation(rows)[:wanted])
    found: list[dict[str, Any]] = table.take(pa.array(picked, pa.int64())).to_pylist()
    return found


def rejected(corpus: Folder, counts: dict[str, dict[str, int]], sources: list[Source]) -> list[Sheet]:
    """Return a sheet for each reason of the plan and of ingest, the most frequent first within its stage.

    Args:
        corpus: the corpus' folder.
        counts: by stage, how many rows went for each reason.
        sources: takes the folders read, for what could not be.
    """
    sheets: list[Sheet] = []
    for stage, title in ((PLAN, "plan"), (RAW, "ingest")):
        source = Source(corpus / stage)
        sources.append(source)
        names = _rejected_files(source.folder, stage)
        found = _by_reason(source, names)
        reasons = sorted(counts.get(stage, {}).items(), key=lambda item: (-item[1], item[0]))
        for name, count in reasons[:REASONS_SHOWN]:
            cards = tuple(_card(row) for row in even(found.get(name, []), HANDFUL))
            sheets.append(Sheet(name, reason(name), status_of(stage, name), title, count, cards))
    return sheets


def _rejected_files(folder: Folder, stage: str) -> list[str]:
    if stage == PLAN:
        return [name for name in folder.names(".parquet") if name.startswith("rejected")]
    return [f"{shard}.parquet" for shard in even(committed(folder), REJECTED_SHARDS)]


def _by_reason(source: Source, names: list[str]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for number, name in enumerate(names):
        rng = np.random.default_rng([SEED, number])
        for table in source.tables(name, _REJECTED_COLUMNS):
            reasons = table["reason"].fill_null("")
            for value in pc.unique(reasons).to_pylist():
                if not value:
                    continue
                rows = np.flatnonzero(pc.equal(reasons, value).to_numpy(zero_copy_only=False))
                picked = np.sort(rng.permutation(rows)[:HANDFUL])
                found.setdefault(value, []).extend(table.take(pa.array(picked, pa.int64())).to_pylist())
    return found


def _card(row: dict[str, Any]) -> Card:
    detail = plain(row.get("opt_out") or row.get("detail"), 120)
    width, height = row.get("original_width") or 0, row.get("original_height") or 0
    frame = None
    if width > 0 and height > 0:
        scale = _FRAME_PX / max(width, height)
        frame = (max(2, round(width * scale)), max(2, round(height * scale)))
    return Card(plain(row.get("caption"), 120), *address(row.get("url")), detail=detail, frame=frame)
