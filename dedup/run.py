"""The stage: signatures of all samples, links between them, and the list of those to leave out."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from dedup import choose, confirm, outcome, same_look
from dedup.boilerplate import remove_boilerplate
from dedup.config import DedupConfig
from dedup.embeddings import Embeddings
from dedup.embeddings import load as load_embeddings
from dedup.exact import same_body
from dedup.near_embeddings import remove_near
from dedup.perceptual import near_hashes
from dedup.signature import Signatures, SignatureWriter, captions, load
from dedup.spread import here, on_ray
from infra import metrics
from infra.cluster import ClusterConfig
from infra.lock import exclusive
from infra.logs import log, progress
from infra.storage import Folder
from shards.layout import DEDUP, RAW, REMOVED, SIGNATURES, Status
from shards.manifest import Manifest

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
        removed = outcome.table(signatures, removals)
        buffer = io.BytesIO()
        pq.write_table(removed, buffer, compression="zstd")
        (folder / DEDUP).write(REMOVED, buffer.getvalue())
        totals = outcome.totals(signatures, removals, embeddings, config)
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
    if embeddings is not None:
        removals = remove_near(removals, embeddings, place, config.semantic)
    if config.text.cap:
        texts = partial(captions, folder.url, signatures)
        removals = remove_boilerplate(removals, signatures.caption_digest, place, texts, config.text)
    return removals


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
    thumbnails = np.empty((len(samples), same_look.THUMBNAIL_PX, same_look.THUMBNAIL_PX, 3), np.uint8)
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
        return same_look.same(one, other, config.confirm_difference)

    return same


def _places(signatures: Signatures, samples: choose.Indices) -> tuple[tuple[int, int], ...]:
    offsets, sizes = signatures.image_offset[samples], signatures.image_bytes[samples]
    return tuple(zip(offsets.tolist(), sizes.tolist(), strict=True))
