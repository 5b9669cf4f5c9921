"""Columns of a shard's sidecar, or of its signatures."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import RunError
from infra.storage import Folder


def columns_of(folder: Folder, shard: str, columns: Sequence[str]) -> pa.Table:
    """Return those of `columns` that a shard's parquet file has, and nothing of the others.

    Raises:
        RunError: the file is missing or damaged.
    """
    name = f"{shard}.parquet"
    try:
        file = pq.ParquetFile(io.BytesIO(folder.read(name)))
        return file.read(columns=[column for column in columns if column in file.schema_arrow.names])
    except (FileNotFoundError, pa.ArrowException) as error:
        problem = " ".join(str(error).split())
        raise RunError(f"{folder.path(name)}: cannot be read ({problem}); see `pairmill verify {folder.url}`") from None
