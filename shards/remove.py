"""Takes samples out of one shard where it lies: same size, same addresses, every other sample as it was.

The order is tar, sidecar, commit, each replaced whole. Done again after an interruption it goes on from whatever it
finds and ends in the same bytes.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.errors import RunError
from infra.storage import Folder
from shards import index
from shards.layout import INDEX, STATS_SUFFIX, Reason, Status
from shards.placeholder import in_tar, placeholder, removed_key
from shards.sample import split_name
from shards.scan import file_digest
from shards.scrub import scrub, taken_down
from shards.tar import members
from shards.writer import ROWS_PER_GROUP

PIECE_BYTES = 1 << 22


@dataclass(frozen=True)
class _Hole:
    key: str
    offset: int
    size: int


def take_out(folder: Folder, name: str, keys: Sequence[str], detail: str) -> list[int]:
    """Take the samples of these keys out of shard `name`; return their places among the shard's samples.

    Their bytes in the tar become one placeholder each, of the same size; their rows in the sidecar are `taken_down`
    and keep nothing of the picture. Rows of these keys that are no samples are only scrubbed.

    Raises:
        RunError: the shard is damaged, or holds other samples than it says. It is left as it was.
    """
    stats, table = _commit(folder, name), _sidecar(folder, name)
    rows = pc.is_in(table["key"], pa.array(keys, pa.string())).to_numpy()
    is_sample = pc.equal(table["status"], Status.SUCCESS.value).to_numpy()
    is_hole = pc.equal(table["reason"], Reason.TAKEN_DOWN.value).to_numpy()
    going = rows & is_sample
    if going.any():
        columns = (table[column].to_pylist() for column in ("key", "offset", "size"))
        holes = [_Hole(*row) for row, there in zip(zip(*columns, strict=True), going, strict=True) if there]
        tar_sha256 = _overlay(folder, name, holes, stats)
    after = taken_down(scrub(table, rows & ~is_sample & ~is_hole), going, detail)
    data = _written(folder, name, table, after)
    sidecar_sha256 = hashlib.sha256(data).hexdigest()
    if not going.any():
        if stats.get("sidecar_sha256") == sidecar_sha256:
            return _places(after, rows)
        tar_sha256 = file_digest(folder, f"{name}.tar")  # of an interrupted run, before its commit
    digests = {"tar_sha256": tar_sha256, "sidecar_bytes": len(data), "sidecar_sha256": sidecar_sha256}
    folder.write_json(name + STATS_SUFFIX, stats | _counts(after) | digests)
    return _places(after, rows)


def update_index(folder: Folder, names: Sequence[str]) -> None:
    """Have the folder's index, if it has one, hold the digests that these shards' commits tell; no address moves."""
    if not names or not folder.exists(INDEX):
        return
    told, wanted = index.load(folder), set(names)
    for place, shard in enumerate(told.shards):
        if shard.name in wanted:
            stats = _commit(folder, shard.name)
            digests = {name: stats[name] for name in ("tar_sha256", "sidecar_bytes", "sidecar_sha256")}
            told.shards[place] = replace(shard, **digests)
    index.save(folder, told)


def _commit(folder: Folder, name: str) -> dict[str, Any]:
    stats = folder.read_json(name + STATS_SUFFIX)
    if not isinstance(stats, dict) or "tar_sha256" not in stats:
        raise _damaged(folder, name, "its commit is none of this format")
    return stats


def _sidecar(folder: Folder, name: str) -> pa.Table:
    try:
        return pq.ParquetFile(io.BytesIO(folder.read(f"{name}.parquet"))).read()
    except (FileNotFoundError, pa.ArrowException) as error:
        raise _damaged(folder, name, f"its sidecar cannot be read ({' '.join(str(error).split())})") from None


def _written(folder: Folder, name: str, before: pa.Table, after: pa.Table) -> bytes:
    """Write the sidecar, unless it is as it should be; return its bytes."""
    if after.equals(before):
        return folder.read(f"{name}.parquet")
    buffer = io.BytesIO()
    pq.write_table(after.combine_chunks(), buffer, compression="zstd", row_group_size=ROWS_PER_GROUP)
    folder.write(f"{name}.parquet", buffer.getvalue())
    return buffer.getvalue()


def _counts(table: pa.Table) -> dict[str, Any]:
    statuses = Counter(table["status"].to_pylist())
    reasons = Counter(reason for reason in table["reason"].to_pylist() if reason)
    counts: dict[str, Any] = {
        "successes" if status == Status.SUCCESS else status.value: statuses[status.value] for status in Status
    }
    holes = int(pc.sum(in_tar(table)).as_py() or 0) - statuses[Status.SUCCESS.value]
    counts |= {"by_status": dict(sorted(statuses.items())), "by_reason": dict(sorted(reasons.items()))}
    return counts | ({"holes": holes} if holes else {})


def _places(table: pa.Table, rows: np.ndarray[Any, np.dtype[np.bool_]]) -> list[int]:
    there = in_tar(table).to_numpy()
    is_hole = pc.equal(table["reason"], Reason.TAKEN_DOWN.value).to_numpy()
    return np.flatnonzero((rows & is_hole)[there]).tolist()


def _overlay(folder: Folder, name: str, holes: list[_Hole], stats: dict[str, Any]) -> str:
    """Replace a tar by one with placeholders in these places; return its SHA-256.

    What is damaged already must not get a digest that says it is whole: the old one is looked at on the way. It
    cannot be right where an interrupted run has been here; then all of the placeholders are there.
    """
    tar = f"{name}.tar"
    before, after = hashlib.sha256(), hashlib.sha256()
    was_here = True
    with folder.open(tar) as source, folder.create(tar) as target:
        at = 0
        for hole in holes:
            _copy(source, target, hole.offset - at, before, after)
            old, new = source.read(hole.size), placeholder(hole.key, hole.size)
            if old != new:
                was_here = False
                _check_is(folder, name, hole.key, old)
            before.update(old)
            after.update(new)
            target.write(new)
            at = hole.offset + hole.size
        _copy(source, target, None, before, after)
        if before.hexdigest() != stats["tar_sha256"] and not was_here:
            raise _damaged(folder, name, "its tar is not what its commit says")
    return after.hexdigest()


def _copy(source: IO[bytes], target: IO[bytes], size: int | None, before: Any, after: Any) -> None:
    """Copy `size` bytes, or all there are, and digest them on the way."""
    while size is None or size > 0:
        piece = source.read(PIECE_BYTES if size is None else min(PIECE_BYTES, size))
        if not piece:
            return
        before.update(piece)
        after.update(piece)
        target.write(piece)
        size = None if size is None else size - len(piece)


def _check_is(folder: Folder, name: str, key: str, data: bytes) -> None:
    """Make sure that these bytes are the sample, and nothing else. Raises RunError."""
    try:
        found = {(split_name(one.name) or ("",))[0] or removed_key(one.name) for one in members(data)}
    except ValueError as error:
        raise _damaged(folder, name, f"sample {key}: {error}") from None
    if found != {key}:
        raise _damaged(folder, name, f"where its sidecar has sample {key} lies another")


def _damaged(folder: Folder, name: str, what: str) -> RunError:
    return RunError(
        f"{folder.path(name)}: this shard is damaged ({what}) and is left as it is; "
        f"see `pairmill verify {folder.url}`, mend it and run the same command again"
    )
