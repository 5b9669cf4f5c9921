"""Writes one shard: tar and sidecar together, the commit (`_stats.json`) last."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.storage import Folder
from shards.layout import SIDECAR, STATS_SUFFIX, Status, by_number
from shards.placeholder import placeholder
from shards.tar import BLOCK_BYTES, END, header, padded

ROWS_PER_GROUP = 10_000


class ShardWriter:
    """One shard being written; use `writing`, which commits it or leaves nothing behind."""

    def __init__(self, name: str, tar: IO[bytes], schema: pa.Schema) -> None:
        self.name, self.schema = name, schema
        self._tar, self._at, self._digest = tar, 0, hashlib.sha256()
        self._rows: list[dict[str, Any]] = []
        told = [name for name in schema.names if name in _FACTS]
        self._facts = told + [name for name in schema.names if name not in SIDECAR.names]
        self.ends: list[int] = []
        self._holes = 0

    def add(self, row: Mapping[str, Any], image: bytes | None = None, extension: str = "jpg") -> None:
        """Add a row in its order; a row of status `success` comes with its encoded `image`.

        The sample's members are KEY.jpg, KEY.txt (the caption) and KEY.json (the row's facts that do not
        depend on the moment it was fetched). Rows without an image only enter the sidecar.

        Raises:
            ValueError: image and status disagree.
        """
        if (image is not None) != (row["status"] == Status.SUCCESS):
            raise ValueError(f"row {row['key']}: status {row['status']} {'with' if image else 'without'} an image")
        entry = dict(row)
        if image is not None:
            entry |= self._add_sample(row, image, extension)
        self._rows.append(entry)

    def add_hole(self, row: Mapping[str, Any]) -> None:
        """Add a row of reason `taken_down` that keeps a place among the samples; a placeholder lies there."""
        start = self._at
        self._write(placeholder(row["key"]))
        self.ends.append(self._at)
        self._rows.append(dict(row) | {"offset": start, "size": self._at - start})
        self._holes += 1

    def sidecar(self) -> bytes:
        """Return the sidecar parquet's bytes for the rows added so far."""
        table = pa.Table.from_pylist(self._rows, schema=self.schema)
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", row_group_size=ROWS_PER_GROUP)
        return buffer.getvalue()

    def close(self) -> None:
        """Write the archive's end."""
        self._write(END)

    def stats(self) -> dict[str, Any]:
        """Return the shard's counts and digests, as its commit file holds them."""
        statuses = Counter(row["status"] for row in self._rows)
        reasons = Counter(row["reason"] for row in self._rows if row["reason"])
        return {
            "shard": self.name,
            "count": len(self._rows),
            "successes": statuses[Status.SUCCESS],
            "failed_to_download": statuses[Status.FAILED_TO_DOWNLOAD],
            "failed_to_resize": statuses[Status.FAILED_TO_RESIZE],
            "filtered": statuses[Status.FILTERED],
            "by_status": dict(sorted(statuses.items())),
            "by_reason": dict(sorted(reasons.items())),
            "tar_bytes": self._at,
            "tar_sha256": self._digest.hexdigest(),
        } | ({"holes": self._holes} if self._holes else {})

    def _add_sample(self, row: Mapping[str, Any], image: bytes, extension: str) -> dict[str, Any]:
        key, start = row["key"], self._at
        facts = _json({name: row[name] for name in self._facts if name in row})
        contents = (
            (extension, image),
            ("txt", row["caption"].encode("utf-8", "replace")),
            ("json", facts.encode("utf-8", "surrogatepass")),
        )
        # One write a sample: a call each for headers and padding would cost more than the copy.
        self._write(b"".join(_member(f"{key}.{suffix}", content) for suffix, content in contents))
        self.ends.append(self._at)
        return {
            "member": f"{key}.{extension}", "offset": start, "size": self._at - start,
            "image_offset": start + BLOCK_BYTES, "image_bytes": len(image),
        }  # fmt: skip

    def _write(self, data: bytes) -> None:
        self._tar.write(data)
        self._digest.update(data)
        self._at += len(data)


def _member(name: str, content: bytes) -> bytes:
    return b"".join((header(name, len(content)), content, bytes(padded(len(content)) - len(content))))


def _json(facts: dict[str, Any]) -> str:
    """Return facts as JSON, which has no NaN and no infinity: these become null."""
    try:
        return json.dumps(facts, ensure_ascii=False, allow_nan=False, default=str)
    except ValueError:
        return json.dumps(_finite(facts), ensure_ascii=False, allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


_FACTS = (
    "key", "url", "caption", "sha256", "phash", "width", "height", "original_width", "original_height",
)  # fmt: skip


@contextmanager
def writing(folder: Folder, name: str, schema: pa.Schema, more_stats: dict[str, Any]) -> Iterator[ShardWriter]:
    """Write shard `name` into `folder`: on a clean end tar, sidecar and last the commit appear; else nothing.

    `more_stats` is read at the end: fill it inside the block with what else the commit should hold.

    Raises:
        RunError: the disk is full.
    """
    with ExitStack() as stack:
        tar = stack.enter_context(folder.create(f"{name}.tar"))
        writer = ShardWriter(name, tar, schema)
        yield writer
        writer.close()
    sidecar = writer.sidecar()
    folder.write(f"{name}.parquet", sidecar)
    digests = {"sidecar_bytes": len(sidecar), "sidecar_sha256": hashlib.sha256(sidecar).hexdigest()}
    folder.write_json(f"{name}{STATS_SUFFIX}", writer.stats() | digests | more_stats)


def committed(folder: Folder) -> list[str]:
    """Return the names of the shards in `folder` that have their commit, in the order of their numbers."""
    return sorted((name.removesuffix(STATS_SUFFIX) for name in folder.names(STATS_SUFFIX)), key=by_number)
