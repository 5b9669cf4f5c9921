"""The stage: signatures of all samples, links between them, and the list of those to leave out."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from dedup import choose, confirm
from dedup.config import DedupConfig
from dedup.embeddings import Embeddings
from dedup.embeddings import load as load_embeddings
from dedup.exact import same_body
from dedup.hamming import BITS, distances
from dedup.near_embeddings import remove_near
from dedup.perceptual import near_hashes
from dedup.signature import Signatures, SignatureWriter, load
from dedup.spread import here, on_ray
from infra import metrics
from infra.cluster import ClusterConfig
from infra.lock import exclusive
from infra.logs import log, progress
from infra.storage import Folder
from shards.layout import DEDUP, RAW, REMOVED, SIGNATURES, Reason, Status
from shards.manifest import Manifest

EXACT, PERCEPTUAL, SEMANTIC = "exact", "perceptual", "semantic"
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("kept_key", pa.string(), nullable=False),
        pa.field("method", pa.string(), nullable=False),  # `exact`, `perceptual` or `semantic`
        pa.field("distance", pa.int32(), nullable=False),  # of the two PDQ hashes, in bits; 256 without one
        pa.field("component", pa.int64(), nullable=False),  # the lowest key in it, as a number
        pa.field("cosine", pa.float32()),  # of the two embeddings; null but for `semantic`
    ]
)
FEW_PICTURES = 5_000
"""Up to so many, this process does the work itself: sooner done than a worker is started."""

_PAIRS_PER_LOOK = 8192


def dedup(corpus: str, config: DedupConfig, cluster: ClusterConfig) -> dict[str, Any]:
    """Write `dedup/removed.parquet`: which samples `repack` is to leave out, for which other one, and why.

    Nothing is deleted. The outcome is the same however the work was cut up, and after any interruption.

    Returns:
        `rows_in` (the raw samples) = `kept` + `removed`, `by_status`, `by_reason`, `components` (of two
        samples or more), `largest_component` (in samples), `unhashed` (samples whose picture is too flat to
        have a hash that tells anything, compared by body alone); where embeddings are given `unembedded`
        (samples that have none).

    Raises:
        UserError: `ingest` is not finished, another configuration, another process at work on the corpus,
            embeddings that are missing or not sound, or faiss is.
        RunError: a raw shard cannot be read.
    """
    folder = Folder(corpus)
    Manifest.existing(folder)
    with exclusive(folder):
        manifest = Manifest.existing(folder)
        manifest.begin(DEDUP, config)
        if manifest.is_done(DEDUP):
            if (folder / DEDUP).exists(REMOVED):
                return manifest.totals(DEDUP)
            manifest.reopen(DEDUP)
        (folder / DEDUP).sweep_temporary()
        (folder / DEDUP / SIGNATURES).sweep_temporary()
        shards = manifest.shards(RAW)
        _write_signatures(folder, shards, config, cluster)
        signatures = load(folder.url, shards, config.source_column)
        embeddings = (
            load_embeddings(config.semantic.embeddings, signatures.keys) if config.semantic.embeddings else None
        )
        removals = _removals(folder, signatures, embeddings, config, cluster)
        table = _table(signatures, removals)
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        (folder / DEDUP).write(REMOVED, buffer.getvalue())
        totals = _totals(signatures, removals, embeddings, config)
        manifest.finish(DEDUP, totals)
    for reason, count in totals["by_reason"].items():
        metrics.rows().inc(count, tags={"stage": DEDUP, "status": Status.FILTERED.value, "reason": reason})
    return totals


def _write_signatures(folder: Folder, shards: Sequence[str], config: DedupConfig, cluster: ClusterConfig) -> None:
    done = {name.removesuffix(".parquet") for name in (folder / DEDUP / SIGNATURES).names(".parquet")}
    todo = [shard for shard in shards if shard not in done]
    with progress("dedup: signatures", len(shards), "shards") as meter:
        meter.advance(len(shards) - len(todo))
        samples = 0
        for _, count in on_ray(SignatureWriter, (folder.url, config.source_column), todo, cluster):
            samples += count
            meter.advance(1, samples=samples)


def _removals(
    folder: Folder,
    signatures: Signatures,
    embeddings: Embeddings | None,
    config: DedupConfig,
    cluster: ClusterConfig,
) -> choose.Removals:
    place = choose.rank(signatures, config)
    leader = same_body(signatures, place, config.unit) if config.exact else np.arange(len(signatures))
    hashed = config.perceptual & (leader == np.arange(len(signatures))) & (signatures.quality >= config.min_quality)
    groups = choose.by_hash(signatures.phash, np.flatnonzero(hashed), place)
    pairs = near_hashes(groups.hashes, config.distance, cluster)
    near = groups.near(pairs)
    log.info("dedup: %d pairs of hashes within distance %d, of %d", len(pairs), config.distance, len(groups.hashes))
    look = _same_look(folder, signatures, near, cluster, config) if config.confirm else _always
    same = _same_caption_too(signatures, look) if config.unit == "pair" else look
    leaders, followers = choose.link_equal_hashes(groups, same)
    links = choose.link_near_hashes(leaders, pairs, same, _PAIRS_PER_LOOK)
    removals = choose.choose(leader, followers, links, place, same)
    return removals if embeddings is None else remove_near(removals, embeddings, place, config.semantic)


def _always(first: choose.Indices, second: choose.Indices) -> npt.NDArray[np.bool_]:
    return np.ones(len(first), bool)


def _same_caption_too(signatures: Signatures, look: choose.SameLook) -> choose.SameLook:
    def same(first: choose.Indices, second: choose.Indices) -> npt.NDArray[np.bool_]:
        alike = (signatures.caption_digest[first] == signatures.caption_digest[second]).all(axis=1)
        alike[alike] = look(first[alike], second[alike])  # a picture may have many captions: few are looked at
        return alike

    return same


def _same_look(
    folder: Folder,
    signatures: Signatures,
    samples: choose.Indices,
    cluster: ClusterConfig,
    config: DedupConfig,
) -> choose.SameLook:
    """Return the comparison of pictures by pixels, for `samples`."""
    samples = np.sort(samples)
    thumbnails = np.empty((len(samples), confirm.SIDE_PX, confirm.SIDE_PX, 3), np.uint8)
    rows = {
        shard: np.flatnonzero(signatures.shard[samples] == number) for number, shard in enumerate(signatures.shards)
    }
    tasks = [(shard, _places(signatures, samples[at])) for shard, at in rows.items() if len(at)]
    if len(samples) <= FEW_PICTURES:
        done = here(confirm.Thumbnailer(folder.url), tasks)
    else:
        done = on_ray(confirm.Thumbnailer, (folder.url,), tasks, cluster)
    with progress("dedup: looking again", len(samples), "pictures") as meter:
        for (shard, places), pixels in done:
            thumbnails[rows[shard]] = pixels
            meter.advance(len(places))

    def same(first: choose.Indices, second: choose.Indices) -> npt.NDArray[np.bool_]:
        one, other = (thumbnails[np.searchsorted(samples, side)] for side in (first, second))
        return confirm.differences(one, other) <= config.confirm_difference

    return same


def _places(signatures: Signatures, samples: choose.Indices) -> tuple[tuple[int, int], ...]:
    offsets, sizes = signatures.image_offset[samples], signatures.image_bytes[samples]
    return tuple(zip(offsets.tolist(), sizes.tolist(), strict=True))


def _table(signatures: Signatures, removals: choose.Removals) -> pa.Table:
    gone = np.flatnonzero(removals.kept >= 0)
    kept, cosine = removals.kept[gone], removals.cosine[gone]
    is_semantic = ~np.isnan(cosine)
    is_hashed = (signatures.quality[gone] >= 0) & (signatures.quality[kept] >= 0)
    bits = np.where(is_hashed, distances(signatures.phash[gone], signatures.phash[kept]), BITS)
    methods = np.where(is_semantic, SEMANTIC, np.where(removals.is_exact[gone], EXACT, PERCEPTUAL))
    columns = {
        "key": pa.array(signatures.keys[gone].tolist(), pa.string()),
        "kept_key": pa.array(signatures.keys[kept].tolist(), pa.string()),
        "method": pa.array(methods.tolist(), pa.string()),
        "distance": pa.array(np.where(is_semantic, bits, removals.distance[gone]), pa.int32()),
        "component": pa.array([int(key) for key in signatures.keys[removals.component[gone]].tolist()], pa.int64()),
        "cosine": pa.array(np.minimum(cosine, np.float32(1)), pa.float32(), mask=~is_semantic),
    }
    return pa.table(columns, schema=SCHEMA)


def _totals(
    signatures: Signatures, removals: choose.Removals, embeddings: Embeddings | None, config: DedupConfig
) -> dict[str, Any]:
    gone, is_semantic = removals.kept >= 0, ~np.isnan(removals.cosine)
    removed, rows = int(gone.sum()), len(signatures)
    reasons = Counter(
        {
            Reason.DUPLICATE_EXACT.value: int(removals.is_exact[gone].sum()),
            Reason.DUPLICATE_PERCEPTUAL.value: int((gone & ~removals.is_exact & ~is_semantic).sum()),
            Reason.DUPLICATE_SEMANTIC.value: int(is_semantic.sum()),
        }
    )
    sizes = np.bincount(removals.component, minlength=1) if rows else np.zeros(1, np.int64)
    statuses = {Status.SUCCESS.value: rows - removed, Status.FILTERED.value: removed}
    unembedded = {} if embeddings is None else {"unembedded": int((~embeddings.has).sum())}
    return {
        "rows_in": rows,
        "kept": rows - removed,
        "removed": removed,
        "by_status": {name: count for name, count in statuses.items() if count},
        "by_reason": {name: count for name, count in sorted(reasons.items()) if count},
        "components": int((sizes > 1).sum()),
        "largest_component": int(sizes.max()),
        "unhashed": int((signatures.quality < config.min_quality).sum()) if config.perceptual else 0,
        **unembedded,
    }
