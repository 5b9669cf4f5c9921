"""The stage: signatures of all samples, links between them, and the list of those to leave out."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from dedup import choose, outcome
from dedup.batches import Batches
from dedup.boilerplate import remove_boilerplate
from dedup.caption_digests import caption_digests
from dedup.clusters import load_faiss
from dedup.config import DedupConfig
from dedup.decontaminate import Overlap, find_overlap, hidden
from dedup.embeddings import Embeddings
from dedup.embeddings import check as check_embeddings
from dedup.embeddings import load as load_embeddings
from dedup.exact import same_body
from dedup.links import settled
from dedup.near_embeddings import remove_near
from dedup.perceptual import near_hashes
from dedup.pictures import Bounds, Pictures, Places, thumbnails
from dedup.same_look import Thumbnails
from dedup.second_look import BATCH_SAMPLES, look_again
from dedup.signature import Signatures, SignatureWriter, load
from dedup.spread import on_ray
from dedup.statistics import giant, statistics
from dedup.suites import Framing, Listed, list_suites
from dedup.text import Digests
from dedup.thresholds import Sheet
from infra import metrics
from infra.cluster import ClusterConfig
from infra.lock import exclusive
from infra.logs import log, progress
from infra.storage import Folder
from shards.layout import DEDUP, RAW, REMOVED, SIGNATURES, Status
from shards.manifest import Manifest


def dedup(corpus: str, config: DedupConfig, cluster: ClusterConfig, *, anew: bool = False) -> dict[str, Any]:
    """Write `dedup/removed.parquet`: which samples `repack` is to leave out, for which other one, and why.

    `dedup/thresholds.parquet` beside it has pairs to choose the thresholds by. Nothing is deleted. The outcome is the
    same however the work was cut up, and after any interruption. With `anew` a corpus takes another configuration than
    dedup was begun with; signatures are made again only where they are of another `source_column`.

    Returns:
        `rows_in` (the raw samples) = `kept` + `removed`, `by_status`, `by_reason`, `components` (of two
        samples or more), `largest_component` (in samples), `unhashed` (samples whose picture is too flat to
        have a hash that tells anything, compared by body alone), what `dedup.statistics` adds; where embeddings are
        given `unembedded` (samples that have none); where suites are given `test_sets` (of each its name and counts).

    Raises:
        UserError: `ingest` is not finished, another configuration, another process at work on the corpus,
            embeddings that are missing or not sound, or faiss is; a suite without pictures; `anew` and `final/` is
            begun.
        RunError: a raw shard cannot be read.
    """
    folder = Folder(corpus)
    Manifest.existing(folder)
    with exclusive(folder):
        manifest = Manifest.existing(folder)
        is_whole = not anew and manifest.is_done(DEDUP) and (folder / DEDUP).exists(REMOVED)
        suites = list_suites(() if is_whole else config.decontaminate.suites)
        if not is_whole:
            _check_embeddings(config)
        _begin(folder, manifest, config, anew)
        if is_whole:
            return manifest.totals(DEDUP)
        (folder / DEDUP).sweep_temporary()
        (folder / DEDUP / SIGNATURES).sweep_temporary()
        shards = manifest.shards(RAW)
        _write_signatures(folder, shards, config, cluster)
        signatures = load(folder.url, shards, config.source_column)
        path, scratch = config.semantic.embeddings, config.semantic.scratch
        embeddings = load_embeddings(path, signatures.keys, scratch=scratch) if path else None
        overlap, shown = _overlap(suites, folder, manifest, signatures, embeddings, config, cluster)
        told, sheet = hidden(signatures, embeddings, shown), Sheet(config, cluster)
        removals = _removals(folder, *told, config, cluster, shown, sheet)
        look = partial(_same_look, folder, signatures, config) if config.confirm else None
        sheet.write(folder / DEDUP, *told, look)
        removed = outcome.table(signatures, removals, overlap)
        buffer = io.BytesIO()
        pq.write_table(removed, buffer, compression="zstd")
        (folder / DEDUP).write(REMOVED, buffer.getvalue())
        totals = outcome.totals(signatures, removals, embeddings, config, overlap)
        totals |= statistics(signatures.keys, removals.component, removed)
        if warning := giant(totals):
            log.warning("dedup: %s", warning)
        manifest.finish(DEDUP, totals)
    for reason, count in totals["by_reason"].items():
        metrics.rows().inc(count, tags={"stage": DEDUP, "status": Status.FILTERED.value, "reason": reason})
    return totals


def _check_embeddings(config: DedupConfig) -> None:
    """Tell of a mistyped path, or of a package that is not there, before anything is recorded or given up."""
    asked = config.decontaminate
    for path in (config.semantic.embeddings, asked.corpus_embeddings, *asked.embeddings):
        if path:
            check_embeddings(path)
    if config.semantic.embeddings:
        load_faiss()


def _begin(folder: Folder, manifest: Manifest, config: DedupConfig, anew: bool) -> None:
    if not anew:
        manifest.begin(DEDUP, config)
        if not (folder / DEDUP).exists(REMOVED):
            manifest.reopen(DEDUP)
        return
    manifest.shards(RAW)  # before the last outcome is given up: nothing can be made without them
    before = manifest.config(DEDUP).get("source_column")
    manifest.begin_anew(DEDUP, config)
    if config.source_column not in (None, before):
        signatures = folder / DEDUP / SIGNATURES
        for name in signatures.names(".parquet"):
            signatures.delete(name)


def _write_signatures(folder: Folder, shards: Sequence[str], config: DedupConfig, cluster: ClusterConfig) -> None:
    done = {name.removesuffix(".parquet") for name in (folder / DEDUP / SIGNATURES).names(".parquet")}
    todo = [shard for shard in shards if shard not in done]
    with progress("dedup: signatures", len(shards), "shards") as meter:
        meter.advance(len(shards) - len(todo))
        samples = 0
        for _, count in on_ray(SignatureWriter, (folder.url, config.source_column), todo, cluster):
            samples += count
            meter.advance(1, samples=samples)


def _overlap(
    suites: Listed,
    folder: Folder,
    manifest: Manifest,
    signatures: Signatures,
    embeddings: Embeddings | None,
    config: DedupConfig,
    cluster: ClusterConfig,
) -> tuple[Overlap | None, npt.NDArray[np.bool_]]:
    """Return what the samples have in common with test pictures, and which of them `[N]` show one: they go first."""
    shown = np.zeros(len(signatures), bool)
    if not suites.names:
        return None, shown
    framing = Framing.of(manifest.config(RAW))

    def look(samples: choose.Indices) -> Thumbnails:
        return thumbnails(folder / RAW, signatures.shards, Places.of(signatures, samples))

    found = find_overlap(suites, signatures, embeddings, look, framing, config, cluster)
    shown[found.contaminated(signatures).sample] = True
    return found, shown


def _removals(
    folder: Folder,
    signatures: Signatures,
    embeddings: Embeddings | None,
    config: DedupConfig,
    cluster: ClusterConfig,
    shown: npt.NDArray[np.bool_],
    sheet: Sheet,
) -> choose.Removals:
    """Return who goes for whom, but for those that have gone already, since they show a test picture."""
    place = choose.rank(signatures, config)
    leader = same_body(signatures, place, config.unit) if config.exact else np.arange(len(signatures))
    hashed = config.perceptual & (leader == np.arange(len(signatures))) & (signatures.quality >= config.min_quality)
    groups = choose.by_hash(signatures.phash, np.flatnonzero(hashed), place)
    pairs = near_hashes(groups.hashes, config.distance, cluster)
    sheet.look_at_hashes(groups)
    log.info("dedup: %d pairs of hashes within distance %d, of %d", len(pairs), config.distance, len(groups.hashes))
    most = BATCH_SAMPLES if config.confirm else len(signatures)
    batches = Batches(groups, pairs, place, signatures.caption_digest if config.unit == "pair" else None, most)
    parts = look_again(folder, signatures, batches, config, cluster) if config.confirm else map(settled, batches)
    removals = choose.choose(leader, parts)
    if embeddings is not None:
        sheet.look_at_embeddings(embeddings, np.flatnonzero(removals.kept == choose.NOBODY))
        removals = remove_near(removals, embeddings, place, config.semantic, cluster)
    if config.text.cap:

        def digests_of(samples: choose.Indices) -> Digests:
            return caption_digests(folder.url, signatures, samples, cluster)

        removals = remove_boilerplate(removals, signatures.caption_digest, place, digests_of, config.text, shown)
    return removals


def _same_look(folder: Folder, signatures: Signatures, config: DedupConfig, samples: choose.Indices) -> choose.SameLook:
    """Return the comparison of pictures by pixels, for `samples` `[n]`, which are in order."""
    places = Places.of(signatures, samples)
    pictures = Pictures(folder / RAW, signatures.shards, places, Bounds.of(config))
    return lambda first, second: pictures.same(*(np.searchsorted(samples, side) for side in (first, second)))
