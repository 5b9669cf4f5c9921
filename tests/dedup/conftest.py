"""A finished corpus of real pictures, to take samples out of."""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pdqhash
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dedup.config import DedupConfig
from dedup.run import dedup
from infra.cluster import ClusterConfig, session
from infra.config import Config
from infra.storage import Folder
from pairmill.sample_web import archive
from shards.layout import PLAN, RAW, ROW, SIDECAR, Reason, Status, part_name, sample_key, shard_name, sidecar_schema
from shards.manifest import Manifest
from shards.repack import RepackConfig, repack
from shards.writer import writing

LOCAL = ClusterConfig(cpus=2, object_store_bytes=80 * 2**20)
SHARDS, ROWS, SAMPLES_PER_FINAL_SHARD = 5, 12, 9
OTHERS = pa.schema([pa.field(ROW, pa.int64()), pa.field("license", pa.string())])
FAILS = 7
"""Every raw shard's row that never became a sample."""


def body(number: int) -> bytes:
    """The picture of a row: emoji that differ, but for row 11 of shard 0, whose body is that of row 0."""
    pictures = sorted(archive.by_key())
    buffer = io.BytesIO()
    archive.by_key()[pictures[37 * number % len(pictures)]].image(128).save(buffer, "PNG")
    return buffer.getvalue()


def row_of(shard: int, row: int) -> tuple[dict[str, Any], bytes | None]:
    """A row as ingest would describe it, and its picture."""
    number = shard * ROWS + row
    told: dict[str, Any] = dict.fromkeys([*SIDECAR.names, *OTHERS.names])
    told |= {
        "key": sample_key(shard, row), "url": f"http://host-{row % 4}.example/{shard}/{row}.png?b=2&a=1",
        "caption": f"picture {row} of shard {shard}", "row": number, "license": "MIT", "attempts": 1,
    }  # fmt: skip
    if row == FAILS:
        return told | {"status": Status.FAILED_TO_DOWNLOAD, "reason": Reason.HTTP_STATUS, "transient": False}, None
    picture = body(0 if (shard, row) == (0, 11) else number)
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB").resize((256, 256)))
    bits, quality = pdqhash.compute(pixels)
    told |= {
        "status": Status.SUCCESS, "reason": Reason.NONE, "sha256": hashlib.sha256(picture).hexdigest(),
        "phash": np.packbits(bits.astype(np.uint8)).tobytes().hex(), "phash_quality": int(quality),
        "width": 128, "height": 128, "original_width": 128, "original_height": 128, "final_url": told["url"],
        "http_status": 200, "content_type": "image/png", "bytes": len(picture),
    }  # fmt: skip
    return told, picture


def build(path: Path) -> None:
    """Write plan and raw shards, then run dedup and repack."""
    folder = Folder(path)
    manifest = Manifest.open(folder)
    manifest.begin(PLAN, Config())
    for shard in range(SHARDS):
        rows = [row_of(shard, row) for row in range(ROWS)]
        names = ["key", "url", "caption", *OTHERS.names]
        table = pa.Table.from_pylist([{name: told[name] for name in names} for told, _ in rows])
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        (folder / PLAN).write(part_name(shard), buffer.getvalue())
        with writing(folder / RAW, shard_name(shard), sidecar_schema(OTHERS), {"requests": ROWS}) as writer:
            for told, picture in rows:
                writer.add(told, picture, "png")
    manifest.finish(PLAN, {"parts": SHARDS, "rows_out": SHARDS * ROWS})
    manifest.begin(RAW, Config())
    kept, failed = SHARDS * (ROWS - 1), SHARDS
    manifest.finish(
        RAW,
        {
            "rows_in": SHARDS * ROWS, "by_status": {"failed_to_download": failed, "success": kept},
            "by_reason": {"http_status": failed}, "shards": SHARDS,
        },
    )  # fmt: skip
    dedup(folder.url, DedupConfig(perceptual=False), LOCAL)
    repack(folder.url, RepackConfig(samples_per_shard=SAMPLES_PER_FINAL_SHARD, seed=1), LOCAL)


@pytest.fixture(scope="session")
def finished_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "corpus"
    with session(LOCAL):
        build(path)
    return path


@pytest.fixture
def corpus(finished_once: Path, tmp_path: Path) -> Folder:
    """A corpus with every stage done: 55 samples in five raw shards, 54 of them in six final ones."""
    return Folder(shutil.copytree(finished_once, tmp_path / "corpus"))


@pytest.fixture
def listed(tmp_path: Path) -> Callable[..., str]:
    """Write a list of what is to go; return its path."""

    def write(*lines: str) -> str:
        (tmp_path / "list.txt").write_text("\n".join(lines) + "\n")
        return str(tmp_path / "list.txt")

    return write
