"""Which samples of raw/ are kept: the successes less the keys that dedup removed."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.errors import RunError
from infra.storage import Folder
from shards import tombstones
from shards.layout import DEDUP, RAW, REMOVED, Reason, Status
from shards.placeholder import in_tar
from shards.tombstones import Removed

_DUPLICATE = "duplicate_"


@dataclass(frozen=True)
class Kept:
    """The kept samples of a raw shard: `[kept]` rows of its sidecar, places among all its samples, digests of bodies.

    Those taken down count among the samples, so that the others keep their places. Kept are of them those that have a
    place in `final/`: the `holes`, of which nothing is in the tar. `in_tar` are the places in it, -1 for a hole.
    """

    rows: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]
    in_tar: npt.NDArray[np.int64]
    tar_samples: int
    bodies: tuple[str | None, ...]
    removed: dict[str, int] = field(default_factory=dict)

    @property
    def holes(self) -> int:
        """How many of the kept samples were taken down."""
        return int((self.in_tar < 0).sum())

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


def select(
    corpus: Folder, shard: str, table: pa.Table | None = None, taken: Mapping[str, Removed] | None = None
) -> Kept:
    """Return which samples of a raw shard are kept, and how many went for which reason.

    `table` is its sidecar, `taken` what was taken down, by key; both are read here if not given.

    Raises:
        RunError: the sidecar cannot be read.
    """
    table = sidecar(corpus, shard) if table is None else table
    taken = tombstones.all_removed(corpus) if taken is None else taken
    all_keys = table["key"].to_pylist()
    is_sample = pc.equal(table["status"], Status.SUCCESS.value).to_numpy()
    is_taken = pc.equal(table["reason"], Reason.TAKEN_DOWN.value).to_numpy()
    rows = np.flatnonzero(is_sample | (is_taken & np.array([key in taken for key in all_keys], dtype=bool)))
    keys = [all_keys[row] for row in rows.tolist()]
    methods = removed_of(corpus, keys)
    placed = [key in taken and taken[key].placed for key in keys]
    gone = np.array([key in methods for key in keys], dtype=bool) | ~(is_sample[rows] | np.array(placed, dtype=bool))
    removed: dict[str, int] = {}
    for key in keys:
        if key in methods:
            reason = reason_of(methods[key])
            removed[reason] = removed.get(reason, 0) + 1
    places = np.flatnonzero(~gone)
    kept = rows[places].astype(np.int64)
    there = in_tar(table).to_numpy()
    of_tar = np.where(is_sample, np.cumsum(there) - 1, -1)[kept]
    bodies = zip(table["sha256"].take(pa.array(kept)).to_pylist(), (keys[place] for place in places), strict=True)
    digests = tuple(taken[key].sha256 if body is None and key in taken else body for body, key in bodies)
    return Kept(kept, places.astype(np.int64), of_tar.astype(np.int64), int(there.sum()), digests, removed)


def reason_of(method: str) -> str:
    """Return the reason for which samples that dedup removed by a method are not kept."""
    return method if method == Reason.TEST_IMAGE else _DUPLICATE + method


def removed_count(corpus: Folder) -> int:
    """Return how many keys dedup removed. Raises RunError if its list is missing."""
    with _removed_list(corpus) as stream:
        return int(pq.ParquetFile(stream).metadata.num_rows)


def removed_of(corpus: Folder, keys: Sequence[str]) -> dict[str, str]:
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
