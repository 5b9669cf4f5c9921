"""Small corpora of real JPEGs, written by the shard writer itself."""

from __future__ import annotations

import gc
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from infra.cluster import ClusterConfig, session
from infra.config import Config
from infra.storage import Folder
from shards import index, reads
from shards.layout import (
    DEDUP,
    PLAN,
    RAW,
    REMOVED,
    SIDECAR,
    Reason,
    Status,
    sample_key,
    shard_name,
    sidecar_schema,
)
from shards.manifest import Manifest
from shards.writer import writing

hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

PASSTHROUGH = pa.schema([pa.field("similarity", pa.float64())])
Removed = Sequence[tuple[str, str]]


def jpeg(number: int) -> bytes:
    """A small picture of its own for each number."""
    pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "jpeg")
    return out.getvalue()


def write_shards(folder: Folder, rows_of: Sequence[int], *, fails_every: int = 0, first: int = 0) -> Folder:
    """Write raw shards, numbered from `first`, with so many rows each; every `fails_every`-th row is no success."""
    for shard, rows in enumerate(rows_of, first):
        with writing(folder, shard_name(shard), sidecar_schema(PASSTHROUGH), {}) as writer:
            for row in range(rows):
                fails = bool(fails_every) and row % fails_every == 1
                fields: dict[str, Any] = dict.fromkeys(SIDECAR.names)
                fields |= {
                    "key": sample_key(shard, row), "url": f"http://h/{shard}/{row}.jpg",
                    "similarity": row / 7,
                    "caption": f"picture {row} of shard {shard}, señor",
                    "status": Status.FILTERED if fails else Status.SUCCESS,
                    "reason": Reason.TOO_SMALL if fails else Reason.NONE,
                }  # fmt: skip
                writer.add(fields, None if fails else jpeg(shard * 10_000 + row))
    return folder


@pytest.fixture(scope="module", autouse=True)
def _loaders_inherit_no_garbage() -> Iterator[None]:
    """Leave nothing of earlier tests (a Ray session's native objects) to be taken down by a forked loader process."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def shards_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Folder]:
    """Write (once) a folder of shards with so many samples each and an index; not to be changed."""
    made: dict[tuple[int, ...], Folder] = {}

    def make(*samples: int) -> Folder:
        if samples not in made:
            made[samples] = write_shards(Folder(tmp_path_factory.mktemp("shards")), samples)
            index.save(made[samples], index.build(made[samples]))
        return made[samples]

    return make


@pytest.fixture(params=[False, True], ids=["plain reads", "pooled reads"])
def either_read(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have reads of small pictures go to used buffers too, as those of a block of larger ones do."""
    if request.param:
        monkeypatch.setattr(reads, "POOLED_FROM_BYTES", 1)


@pytest.fixture
def own_shards(tmp_path: Path) -> Folder:
    """A folder of three shards with index that a test may damage."""
    folder = write_shards(Folder(tmp_path / "own"), [20, 30, 14], fails_every=7)
    index.save(folder, index.build(folder))
    return folder


def deduplicated(url: str, rows_of: Sequence[int], removed: Removed, first: int = 0) -> Folder:
    """A corpus whose raw/ and dedup/ are done: what repack starts from."""
    corpus = Folder(url)
    corpus.write_json("corpus.json", {"format": 1, "stages": {}})
    manifest = Manifest.open(corpus)
    manifest.begin(PLAN, Config())
    manifest.finish(PLAN, {})
    manifest.begin(RAW, Config())
    write_shards(corpus / RAW, rows_of, fails_every=5, first=first)
    manifest.finish(RAW, {"shards": len(rows_of)})
    manifest.begin(DEDUP, Config())
    out = io.BytesIO()
    columns = {
        "key": [key for key, _ in removed], "kept_key": ["" for _ in removed],
        "method": [method for _, method in removed], "distance": [0] * len(removed),
        "component": list(range(len(removed))),
    }  # fmt: skip
    types = [pa.string(), pa.string(), pa.string(), pa.int64(), pa.int64()]
    pq.write_table(pa.table(columns, schema=pa.schema(list(zip(columns, types, strict=True)))), out)
    (corpus / DEDUP).write(REMOVED, out.getvalue())
    manifest.finish(DEDUP, {})
    return corpus


@pytest.fixture(scope="session")
def deduplicated_corpus() -> Callable[..., Folder]:
    """Make a corpus that repack can start from, at a URL."""
    return deduplicated


@pytest.fixture(scope="session")
def local_ray(s3_gateway: object) -> Iterator[ClusterConfig]:
    """One local Ray for all tests of a process; its workers inherit the S3 server's address and keys."""
    settings = ClusterConfig(cpus=2, object_store_bytes=80 * 2**20)
    with session(settings):
        yield settings
