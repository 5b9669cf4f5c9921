"""Embeddings of a folder's pictures by a trained model: a parquet file for each shard, with a key and a vector a row.

One process on one device; several may share the work by folders. Decoding is spread over threads.
"""

from __future__ import annotations

import hashlib
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import UserError
from infra.lock import exclusive
from infra.logs import progress
from infra.storage import Folder
from shards.layout import EMBEDDED, SOURCE_KEY
from train.embed_sources import Part, Source, source_of
from train.evaluate.run import Encoder, load_model
from train.model import DualEncoder
from train.parallel import chosen_device

RECORD = EMBEDDED
"""What the files of a folder were made of and by; written first."""
KEY, EMBEDDING = "key", "embedding"


def embed(checkpoint: str | Path, folder: str, out: str, *, threads: int = 8) -> dict[str, Any]:
    """Write the image embeddings of every picture in a folder: unit length, float16, a file a shard.

    A file appears whole, and one that is there already is left alone, so an interrupted run goes on. Rows have `key`
    and `embedding`, of a `final/` also `source_key`, the key in `raw/`. A sample that cannot be decoded is named in
    the log, counted and left out.

    Args:
        checkpoint: run folder (its newest checkpoint; averaged weights, if there are any), or one checkpoint.
        folder: `raw/` or `final/` of a corpus, any folder of webdataset tars, an evaluation suite in CLIP_benchmark's
            layout, or a folder of picture files: 10,000 of them count as a shard, and the key is the path.
        out: folder or URL for the files.
        threads: that decode pictures.

    Returns:
        `out`, `shards`, `skipped` (shards that were there before), `samples` and `undecodable` (of those written
        now), `width` (of an embedding), `step`.

    Raises:
        UserError: no checkpoint or no pictures there, `out` holds embeddings of another folder or model.
        RunError: no checkpoint is sound, or a shard cannot be read.
    """
    model, tokenizer, config, state = load_model(checkpoint)
    device = chosen_device()
    encoder = Encoder(model.to(device), tokenizer, config, device)
    source, target = source_of(folder), Folder(out)
    record = {
        "folder": source.folder.url, "weights_sha256": _fingerprint(model), "step": state["step"],
        "width": model.config.embed_dim, "image_size": encoder.side, **source.facts,
    }  # fmt: skip
    with exclusive(target):
        target.sweep_temporary()
        _check_record(target, record)
        done = set(target.names(".parquet"))
        todo = [part for part in source.parts if f"{part.name}.parquet" not in done]
        counts = _embed_parts(source, target, todo, encoder, threads)
    skipped = len(source.parts) - len(todo)
    facts = {"width": record["width"], "step": record["step"]}
    return {"out": target.url, "shards": len(source.parts), "skipped": skipped, **counts, **facts}


def _embed_parts(source: Source, target: Folder, todo: list[Part], encoder: Encoder, threads: int) -> dict[str, int]:
    samples = undecodable = 0
    with (
        progress("embed", len(todo), "shards") as meter,
        ThreadPoolExecutor(threads, thread_name_prefix="embed") as pool,
    ):
        for part in todo:
            table = _embedded(source, part, encoder, pool)
            buffer = io.BytesIO()
            pq.write_table(table, buffer, compression="zstd")
            target.write(f"{part.name}.parquet", buffer.getvalue())
            samples += table.num_rows
            undecodable += part.samples - table.num_rows
            meter.advance(1, samples=samples)
    return {"samples": samples, "undecodable": undecodable}


def _embedded(source: Source, part: Part, encoder: Encoder, pool: ThreadPoolExecutor) -> pa.Table:
    keys, source_keys, parts = [], [], [np.empty((0, encoder.model.config.embed_dim), np.float16)]
    for batch in source.batches(part, encoder.side, pool):
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
