"""The keys of a shard's samples, without reading their content."""

from __future__ import annotations

import io

import pyarrow.parquet as pq

from infra.storage import Folder
from shards.index import Shard
from shards.placeholder import in_tar
from shards.scan import scan_samples


def keys_in(folder: Folder, shard: Shard) -> list[str]:
    """Return the keys of a shard's samples in their order, of those taken down too: from its sidecar, or its tar."""
    if shard.sidecar_bytes is None:
        return [key for key, _ in scan_samples(folder, shard.name)]
    file = pq.ParquetFile(io.BytesIO(folder.read(f"{shard.name}.parquet")))
    told = [name for name in ("key", "status", "reason", "offset") if name in file.schema_arrow.names]
    table = file.read(columns=told)
    kept: list[str] = table.filter(in_tar(table))["key"].to_pylist()
    return kept
