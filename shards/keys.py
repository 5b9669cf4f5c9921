"""The keys of a shard's samples, without reading their content."""

from __future__ import annotations

import io

import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.storage import Folder
from shards.index import Shard
from shards.layout import Status
from shards.scan import scan_samples


def keys_in(folder: Folder, shard: Shard) -> list[str]:
    """Return the keys of a shard's samples in their order: from its sidecar, or from its tar's headers."""
    if shard.sidecar_bytes is None:
        return [key for key, _ in scan_samples(folder, shard.name)]
    table = pq.read_table(io.BytesIO(folder.read(f"{shard.name}.parquet")), columns=["key", "status"])
    kept: list[str] = table.filter(pc.equal(table["status"], Status.SUCCESS.value))["key"].to_pylist()
    return kept
