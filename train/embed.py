"""Embeddings of a folder's pictures by a trained model: a parquet file for each shard, with a key and a vector a row.

One process on one device; several may share the work by folders. Decoding is spread over threads.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from infra.errors import UserError
from infra.lock import exclusive
from infra.logs import log, progress
from infra.storage import Folder
from shards.index import Index, Shard, load_or_scan
from shards.layout import EMBEDDED, SOURCE_KEY
from shards.reads import Reader
from shards.sample import FORMATS, IMAGES, UNDECODABLE, BadSampleError, parse
from train.evaluate.run import BATCH, Encoder, load_model, square
from train.model import DualEncoder
from train.parallel import chosen_device

RECORD = EMBEDDED
"""What the files of a folder were made of and by; written first."""
KEY, EMBEDDING = "key", "embedding"


class Prepared(NamedTuple):
    """A sample's keys and its picture, uint8 `[H, W, 3]`."""

    key: str
    source_key: str | None
    pixels: NDArray[np.uint8]


def embed(checkpoint: str | Path, folder: str, out: str, *, threads: int = 8) -> dict[str, Any]:
    """Write the image embeddings of every sample in a shard folder: unit length, float16, a file a shard.

    A file appears whole, and one that is there already is left alone, so an interrupted run goes on. Rows have `key`
    and `embedding`, of a `final/` also `source_key`, the key in `raw/`. A sample that cannot be decoded is named in
    the log, counted and left out.

    Args:
        checkpoint: run folder (its newest checkpoint; averaged weights, if there are any), or one checkpoint.
        folder: `raw/` or `final/` of a corpus, or any folder of webdataset tars.
        out: folder or URL for the files.
        threads: that decode pictures.

    Returns:
        `out`, `shards`, `skipped` (shards that were there before), `samples` and `undecodable` (of those written
        now), `width` (of an embedding), `step`.

    Raises:
        UserError: no checkpoint or no shards there, `out` holds embeddings of another folder or model.
        RunError: no checkpoint is sound, or a shard cannot be read.
    """
    model, tokenizer, config, state = load_model(checkpoint)
    device = chosen_device()
    encoder = Encoder(model.to(device), tokenizer, config, device)
    source, target = Folder(folder), Folder(out)
    if not source.exists():
        raise UserError(f"{folder}: no such folder; give raw/ or final/ of a corpus")
    index = load_or_scan(source)
    record = {
        "folder": source.url, "weights_sha256": _fingerprint(model), "step": state["step"],
        "width": model.config.embed_dim, "image_size": encoder.side,
    }  # fmt: skip
    with exclusive(target):
        target.sweep_temporary()
        _check_record(target, record)
        done = set(target.names(".parquet"))
        todo = [shard for shard in index.shards if f"{shard.name}.parquet" not in done]
        counts = _embed_shards(source, target, index, todo, encoder, threads)
    skipped = len(index.shards) - len(todo)
    facts = {"width": record["width"], "step": record["step"]}
    return {"out": target.url, "shards": len(index.shards), "skipped": skipped, **counts, **facts}


def _embed_shards(
    source: Folder, target: Folder, index: Index, todo: list[Shard], encoder: Encoder, threads: int
) -> dict[str, int]:
    samples = undecodable = 0
    reader = Reader(source, index)
    with (
        progress("embed", len(todo), "shards") as meter,
        ThreadPoolExecutor(threads, thread_name_prefix="embed") as pool,
    ):
        for shard in todo:
            table = _embedded(reader, shard, encoder, pool)
            buffer = io.BytesIO()
            pq.write_table(table, buffer, compression="zstd")
            target.write(f"{shard.name}.parquet", buffer.getvalue())
            samples += table.num_rows
            undecodable += shard.samples - table.num_rows
            meter.advance(1, samples=samples)
    return {"samples": samples, "undecodable": undecodable}


def _embedded(reader: Reader, shard: Shard, encoder: Encoder, pool: ThreadPoolExecutor) -> pa.Table:
    keys, source_keys, parts = [], [], [np.empty((0, encoder.model.config.embed_dim), np.float16)]
    for batch in _batches(reader, shard, encoder.side, pool):
        keys += [one.key for one in batch]
        source_keys += [one.source_key for one in batch]
        features = encoder.squares([one.pixels for one in batch])
        parts.append(features.float().cpu().numpy().astype(np.float16))
    vectors = np.concatenate(parts)
    columns = {KEY: pa.array(keys, pa.string())}
    if any(source_keys):
        columns[SOURCE_KEY] = pa.array(source_keys, pa.string())
    columns[EMBEDDING] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel(), pa.float16()), vectors.shape[1])
    return pa.table(columns)


def _batches(reader: Reader, shard: Shard, side: int, pool: ThreadPoolExecutor) -> Iterator[list[Prepared]]:
    """Yield a shard's samples that can be decoded, in order. Raises UnreadableShardError."""
    stop = shard.first_sample + shard.samples
    for first in range(shard.first_sample, stop, BATCH):
        last = min(stop, first + BATCH)
        (piece,) = reader.read(first, last)
        if piece.fault is not None:
            raise piece.fault
        samples = [bytes(piece.sample(number)) for number in range(first, last)]
        prepared = pool.map(partial(_prepared, where=piece.url, side=side), samples)
        if batch := [one for one in prepared if one is not None]:
            yield batch


def _prepared(data: bytes, where: str, side: int) -> Prepared | None:
    """Return a sample's picture as evaluation takes it; None for one that is left out, which is told."""
    key = "a sample"
    try:
        sample = parse(data, ("image",))
        key = sample["__key__"]
        body = next(sample[name] for name in IMAGES if name in sample)
        with Image.open(io.BytesIO(body), formats=FORMATS) as image:
            return Prepared(key, _source_key(sample), square(image.convert("RGB"), side))
    except (BadSampleError, *UNDECODABLE) as error:
        log.warning("%s: %s has no embedding, it cannot be decoded (%s)", where, key, error)
        return None


def _source_key(sample: dict[str, Any]) -> str | None:
    facts = json.loads(sample["json"]) if "json" in sample else None
    found = facts.get(SOURCE_KEY) if isinstance(facts, dict) else None
    return found if isinstance(found, str) else None


def _check_record(target: Folder, record: dict[str, Any]) -> None:
    """Note what the files are made of, or compare. Raises UserError where they are another's."""
    if not target.exists(RECORD):
        if not target.names(".parquet"):
            target.write_json(RECORD, record)
            return
        raise UserError(f"{target.url}: holds parquet files that are not `embed`'s; give a new folder with --out")
    before = target.read_json(RECORD)
    other = [name for name, value in record.items() if before.get(name) != value]
    if other:
        shown = "; ".join(f"{name}: {before.get(name)} there, {record[name]} now" for name in other)
        raise UserError(f"{target.url}: holds embeddings of another folder or model ({shown}); give a new --out")


def _fingerprint(model: DualEncoder) -> str:
    """Return a digest of the image tower's weights, 16 hex digits: the same wherever the run has been moved to."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.visual.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().float().numpy().tobytes())
    return found.hexdigest()[:16]
