"""The rows of index.parquet: their schema, and what no index is."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from shards.layout import FORMAT_VERSION

VERSION_KEY = b"pairmill.format"
SCHEMA = pa.schema(
    [
        pa.field("shard", pa.string(), nullable=False),
        pa.field("samples", pa.int32(), nullable=False),
        pa.field("first_sample", pa.int64(), nullable=False),
        pa.field("tar_bytes", pa.int64(), nullable=False),
        pa.field("tar_sha256", pa.string()),
        pa.field("sidecar_bytes", pa.int64()),
        pa.field("sidecar_sha256", pa.string()),
        pa.field("ends", pa.list_(pa.int64()), nullable=False),
    ],
    metadata={VERSION_KEY: str(FORMAT_VERSION).encode()},
)
"""One row a shard, in order. Sample `i` of a shard occupies `[ends[i - 1] or 0, ends[i])` of its tar."""
DAMAGES = (pa.ArrowException, OSError, KeyError, ValueError)
"""What reading a damaged index raises: Arrow's errors are of several families, and text may be no UTF-8."""


def opened(source: bytes) -> pq.ParquetFile:
    """Open an index; whoever reads of it a page that has a checksum has it compared."""
    return pq.ParquetFile(io.BytesIO(source), page_checksum_verification=True)


def version_of(file: pq.ParquetFile) -> str:
    """Return the format version that an index is of, `none` for a file that tells none."""
    return (file.schema_arrow.metadata or {}).get(VERSION_KEY, b"none").decode()


def rows_of(file: pq.ParquetFile) -> tuple[list[dict[str, Any]], list[int]]:
    """Return an index's rows without their addresses, and how many each row group has. Raises one of `DAMAGES`."""
    for field in SCHEMA:
        if field.name not in file.schema_arrow.names:
            raise KeyError(f"no column {field.name}")
        _check_type(field, file.schema_arrow.field(field.name).type)
    table = file.read(columns=[name for name in SCHEMA.names if name != "ends"])
    for name in table.schema.names:
        if table.column(name).null_count and not SCHEMA.field(name).nullable:
            raise ValueError(f"column {name} has nulls")
    groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    if sum(groups) != len(table):
        raise ValueError(f"{len(table)} rows in row groups of {sum(groups)}")
    return table.to_pylist(), groups


def ends_of(file: pq.ParquetFile, group: int, rows: int) -> list[npt.NDArray[np.int64]]:
    """Return the addresses of a row group's shards, which are so many. Raises one of `DAMAGES`."""
    column = file.read_row_group(group, columns=["ends"]).column("ends")
    if len(column) != rows or column.null_count:
        raise ValueError(f"row group {group} has addresses for {len(column) - column.null_count} of {rows} shards")
    if any(scalar.values.null_count for scalar in column):
        raise ValueError(f"row group {group} has addresses that are null")
    # Not `to_numpy`, which imports pandas where there is one: a second until the first batch.
    return [np.from_dlpack(scalar.values).astype(np.int64, copy=False) for scalar in column]


def _check_type(field: pa.Field, found: pa.DataType) -> None:
    """Make sure that a column's values can be read as what it should hold. Raises ValueError."""
    is_right: Callable[[pa.DataType], bool] = pa.types.is_integer
    inner = found.value_type if pa.types.is_dictionary(found) else found
    if pa.types.is_list(field.type):
        is_list = pa.types.is_list(found) or pa.types.is_large_list(found)
        inner = found.value_type if is_list else pa.string()
    elif pa.types.is_string(field.type):
        is_right = _is_text
    if not is_right(inner) and not (field.nullable and pa.types.is_null(inner)):
        raise ValueError(f"column {field.name} is of type {found}, not {field.type}")


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
