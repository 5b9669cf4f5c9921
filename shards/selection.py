"""Which samples of raw/ are kept: the successes less the keys that dedup removed."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.errors import RunError
from infra.storage import Folder
from shards.layout import DEDUP, RAW, REMOVED, Status

REMOVED_REASON_PREFIX = "duplicate_"


@dataclass(frozen=True)
class Kept:
    """The kept samples of a raw shard: `[kept]` rows of its sidecar, places in its tar, digests of bodies."""

    rows: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]
    successes: int
    bodies: tuple[str | None, ...]
    removed: dict[str, int] = field(default_factory=dict)

    def digest(self) -> str:
        """Return a hex digest of which samples are kept, and of what they were made of."""
        return hashlib.sha256(self.places.tobytes() + json.dumps(self.bodies).encode()).hexdigest()


def sidecar(corpus: Folder, shard: str) -> pa.Table:
    """Return a raw shard's sidecar. Raises RunError if it is missing or damaged."""
    raw = corpus / RAW
    try:
        return pq.read_table(io.BytesIO(raw.read(f"{shard}.parquet")))
    except (FileNotFoundError, pa.ArrowException) as error:
        problem = " ".join(str(error).split())
        raise RunError(f"{raw.path(shard + '.parquet')}: cannot be read ({problem}); verify raw/") from None


def select(corpus: Folder, shard: str, table: pa.Table | None = None) -> Kept:
    """Return which samples of a raw shard are kept, and how many went for which reason.

    `table` is its sidecar, read here if not given.

    Raises:
        RunError: the sidecar cannot be read.
    """
    table = sidecar(corpus, shard) if table is None else table
    rows = np.flatnonzero(pc.equal(table["status"], Status.SUCCESS).to_numpy(zero_copy_only=False))
    keys = table["key"].take(pa.array(rows)).to_pylist()
    methods = _removed_of(corpus, keys)
    gone = np.array([key in methods for key in keys], dtype=bool)
    removed: dict[str, int] = {}
    for key in keys:
        if key in methods:
            reason = REMOVED_REASON_PREFIX + methods[key]
            removed[reason] = removed.get(reason, 0) + 1
    places = np.flatnonzero(~gone)
    kept = rows[places].astype(np.int64)
    bodies = tuple(table["sha256"].take(pa.array(kept)).to_pylist())
    return Kept(kept, places.astype(np.int64), len(rows), bodies, removed)


def removed_count(corpus: Folder) -> int:
    """Return how many keys dedup removed. Raises RunError if its list is missing."""
    with _removed_list(corpus) as stream:
        return int(pq.ParquetFile(stream).metadata.num_rows)


def _removed_of(corpus: Folder, keys: Sequence[str]) -> dict[str, str]:
    """Return method by key for those of `keys` that are removed; row groups that cannot hold any are not read."""
    methods: dict[str, str] = {}
    if not keys:
        return methods
    wanted, first, last = pa.array(keys, pa.string()), min(keys), max(keys)
    with _removed_list(corpus) as stream:
        file = pq.ParquetFile(stream)
        column = file.schema_arrow.get_field_index("key")
        for group in range(file.num_row_groups):
            known = file.metadata.row_group(group).column(column).statistics
            if known is not None and known.has_min_max and (known.max < first or known.min > last):
                continue
            table = file.read_row_group(group, columns=["key", "method"])
            table = table.filter(pc.is_in(table["key"], wanted))
            methods.update(zip(table["key"].to_pylist(), table["method"].to_pylist(), strict=True))
    return methods


def _removed_list(corpus: Folder) -> IO[bytes]:
    folder = corpus / DEDUP
    try:
        return folder.open(REMOVED)
    except FileNotFoundError:
        raise RunError(f"{folder.path(REMOVED)}: missing, though dedup is done; run it again") from None
