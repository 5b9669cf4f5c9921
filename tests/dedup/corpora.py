"""Raw shards as ingest leaves them, of pictures and copies of them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pdqhash
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from infra.cluster import ClusterConfig
from infra.config import Config
from infra.storage import Folder
from pairmill.sample_web import archive
from shards.layout import DEDUP, PLAN, RAW, REMOVED, SIDECAR, Reason, Status, sample_key, shard_name
from shards.manifest import Manifest
from shards.writer import writing

Row = dict[str, Any]

LOCAL = ClusterConfig(cpus=2)


class NoConfig(Config):
    """A stage that was told nothing."""


def row_of(body: bytes, caption: str = "a picture", **fields: Any) -> Row:
    """A sample as ingest would describe it; `fields` overrule."""
    image = Image.open(io.BytesIO(body)).convert("RGB")
    bits, quality = pdqhash.compute(np.asarray(image.resize((256, 256), Image.Resampling.BILINEAR)))
    return {
        "caption": caption, "status": Status.SUCCESS.value, "reason": "", "image": body,
        "sha256": hashlib.sha256(body).hexdigest(),
        "phash": np.packbits(bits.astype(np.uint8)).tobytes().hex(), "phash_quality": int(quality),
        "width": image.width, "height": image.height,
        "original_width": image.width, "original_height": image.height,
    } | fields  # fmt: skip


def failed_row(reason: Reason = Reason.TIMEOUT) -> Row:
    return {
        "caption": "lost", "status": Status.FAILED_TO_DOWNLOAD.value, "reason": reason.value, "image": None,
    }  # fmt: skip


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def write_corpus(path: Path, rows: Sequence[Row], rows_per_shard: int, first: int = 0) -> str:
    """Write `rows` as the raw shards, numbered from `first`, of a corpus whose plan and ingest are done."""
    folder = Folder(path)
    manifest = Manifest.open(folder)
    passed = sorted({name for row in rows for name in row} - {"image", *SIDECAR.names})
    schema = pa.schema([*SIDECAR, *(pa.field(name, pa.string()) for name in passed)])
    shards = range(0, max(1, len(rows)), rows_per_shard)
    for stage, totals in ((PLAN, {"parts": len(shards)}), (RAW, {"rows_in": len(rows)})):
        manifest.begin(stage, NoConfig())
        manifest.finish(stage, totals)
    for shard, start in enumerate(shards, first):
        with writing(folder / RAW, shard_name(shard), schema, {}) as writer:
            for number, row in enumerate(rows[start : start + rows_per_shard]):
                key = sample_key(shard, number)
                fields = {name: value for name, value in row.items() if name != "image"}
                writer.add({"key": key, "url": f"http://x.test/{key}", **fields}, row["image"])
    return folder.url


def picture(key: str, side_px: int = 128) -> Image.Image:
    return archive.by_key()[key].image(side_px)


def removed(corpus: str) -> dict[str, dict[str, Any]]:
    table = pq.read_table(io.BytesIO((Folder(corpus) / DEDUP).read(REMOVED)))
    return {row["key"]: row for row in table.to_pylist()}


def copies() -> list[Row]:
    """Four pictures; the first with a byte copy, a JPEG, a WebP and a larger version; a row that failed."""
    fox, pig = picture("noto-1f98a"), picture("noto-1f437")
    return [
        row_of(encoded(fox), "fox"),
        row_of(encoded(pig), "pig"),
        failed_row(),
        row_of(encoded(fox), "the same bytes with a longer caption"),
        row_of(encoded(fox, "JPEG", quality=60), "fox"),
        row_of(encoded(fox, "WEBP", quality=70), "fox"),
        row_of(encoded(picture("noto-1f98a", 192), "JPEG", quality=80), "fox, larger"),
        row_of(encoded(picture("noto-1f43b")), "bear"),
    ]
