"""A sidecar's row with nothing left that tells what its picture was."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shards.layout import ROW, SIDECAR, SOURCE_KEY, Reason, Status

KEPT = ("key", "status", "reason", "transient", "attempts", "fetched_at", "offset", "size", ROW, SOURCE_KEY)
"""What a row keeps: who it was and where it lay. `url` and `caption` become empty, all else null."""
EMPTY = ("url", "caption")


def scrubbed(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of a part or a sidecar with what may be kept of it."""
    return {name: "" if name in EMPTY else row[name] if name in KEPT else None for name in row}


def scrub(table: pa.Table, rows: npt.NDArray[np.bool_], also_kept: tuple[str, ...] = ()) -> pa.Table:
    """Return a sidecar's, or a part's, table with the rows where `rows`, `[N]`, says so scrubbed."""
    if not rows.any():
        return table
    columns, fields = [], []
    for field in table.schema:
        column = table[field.name]
        if field.name in EMPTY:
            column = _filled(column, rows, "")
        elif field.name not in (*KEPT, *also_kept):
            column = column.take(pa.array(np.arange(len(rows)), mask=rows))  # a null index takes a null
        columns.append(column)
        fields.append(field if field.name in SIDECAR.names else field.with_nullable(True))
    return pa.table(columns, schema=pa.schema(fields, metadata=table.schema.metadata))


def taken_down(table: pa.Table, rows: npt.NDArray[np.bool_], detail: str) -> pa.Table:
    """Return a sidecar in which these samples were taken down: scrubbed, with their place in the tar, and `detail`."""
    if not rows.any():
        return table
    table = scrub(table, rows)
    for name, value in (("status", Status.FILTERED.value), ("reason", Reason.TAKEN_DOWN.value), ("detail", detail)):
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(name), _filled(table[name], rows, value))
    return table


def _filled(column: pa.ChunkedArray, rows: npt.NDArray[np.bool_], value: str) -> pa.ChunkedArray:
    texts = column.to_pylist()
    return pa.chunked_array([[value if there else text for text, there in zip(texts, rows, strict=True)]], column.type)
