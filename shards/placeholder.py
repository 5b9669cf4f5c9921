"""What lies in a tar where a sample was taken down: one member of its size, that every reader passes over.

Its name is of the kind that webdataset takes for no sample (`__meta__/…`), so that foreign readers go by it too.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from shards.layout import Reason, Status
from shards.tar import BLOCK_BYTES, header

PREFIX = "__removed__/"


def placeholder(key: str, size: int = BLOCK_BYTES) -> bytes:
    """Return a member of `size` bytes (whole blocks, header included) that says that `key` was here, and no more."""
    return header(f"{PREFIX}{key}", size - BLOCK_BYTES) + bytes(size - BLOCK_BYTES)


def removed_key(name: str) -> str | None:
    """Return the key of the sample that a member stands for; None for a member of any other kind."""
    key = name.removeprefix(PREFIX)
    return key if key != name and key and "/" not in key else None


def in_tar(sidecar: pa.Table) -> pa.ChunkedArray:
    """Tell of each row of a sidecar, `[rows]`, whether it has a place in the tar: a sample, or what it left there.

    Needs the columns `status`, and `reason` and `offset` where there are any.
    """
    found = pc.equal(sidecar["status"], Status.SUCCESS.value)
    if not {"reason", "offset"} <= set(sidecar.schema.names):
        return found
    is_hole = pc.and_(pc.equal(sidecar["reason"], Reason.TAKEN_DOWN.value), pc.is_valid(sidecar["offset"]))
    return pc.fill_null(pc.or_(found, is_hole), False)
