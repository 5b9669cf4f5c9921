"""Where sample rows come from: an even choice of shards, the columns needed, pictures by ranged reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.storage import Folder

SEED = 0
"""Seed of every choice on the page, so that the same corpus gives the same page."""
PIECES = 8
"""Row groups read of one file at most, evenly chosen."""


@dataclass
class Source:
    """A folder of shards that is read a little here and there; `unreadable` are the files that could not be."""

    folder: Folder
    unreadable: list[str] = field(default_factory=list)

    def tables(self, name: str, columns: Sequence[str], pieces: int = PIECES) -> Iterator[pa.Table]:
        """Yield evenly chosen row groups of a parquet file with those of `columns` that it has."""
        try:
            with self.folder.open(name) as stream:
                file = pq.ParquetFile(stream)
                has = [column for column in columns if column in file.schema_arrow.names]
                for group in even(range(file.num_row_groups), pieces):
                    yield file.read_row_group(group, columns=has)
        except (OSError, pa.ArrowException):
            self.unreadable.append(self.folder.path(name))

    def rows_at(self, name: str, numbers: Sequence[int], columns: Sequence[str]) -> dict[int, dict[str, Any]]:
        """Return rows of a parquet file by their number in it; numbers beyond its end are left out."""
        found: dict[int, dict[str, Any]] = {}
        start = 0
        for table in self.tables(name, columns, pieces=1 << 30):
            inside = [number for number in numbers if start <= number < start + table.num_rows]
            rows = table.take(pa.array([number - start for number in inside], pa.int64())).to_pylist()
            found.update(zip(inside, rows, strict=True))
            start += table.num_rows
        return found

    def picture(self, shard: str, row: dict[str, Any]) -> bytes | None:
        """Return the bytes of a row's picture, in one ranged read; None if it has none."""
        offset, length = row.get("image_offset"), row.get("image_bytes")
        if offset is None or not length:
            return None
        try:
            return self.folder.read_range(f"{shard}.tar", offset, offset + length)
        except OSError:
            self.unreadable.append(self.folder.path(f"{shard}.tar"))
            return None


def even(items: Sequence[Any], limit: int) -> list[Any]:
    """Return at most `limit` items, evenly spread over the sequence and in its order."""
    if len(items) <= limit:
        return list(items)
    return [items[at * len(items) // limit] for at in range(limit)]
