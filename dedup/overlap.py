"""What a corpus has in common with test sets, and nothing else: `pairmill dedup --report-only`."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from dedup.config import DedupConfig
from dedup.decontaminate import find_overlap
from dedup.embeddings import load as load_embeddings
from dedup.pictures import Places, thumbnails
from dedup.same_look import Thumbnails
from dedup.signature import SCHEMA, Signatures, SignatureWriter, of_tables
from dedup.spread import few_or_on_ray
from dedup.suites import Framing, list_suites
from infra.cluster import ClusterConfig
from infra.errors import UserError
from infra.logs import progress
from infra.storage import Folder
from shards import tombstones
from shards.layout import DEDUP, FINAL, RAW, REMOVED, SIGNATURES
from shards.manifest import Manifest
from shards.writer import committed


def report_overlap(corpus: str, config: DedupConfig, cluster: ClusterConfig) -> dict[str, Any]:
    """Compare a corpus with `config.decontaminate.suites`; nothing is written, whatever stage it is at.

    Looked at are all samples of `raw/`; where it has been removed after `repack`, those of `final/`.

    Returns:
        `corpus`, `samples` (looked at), `test_sets` (of each its name and counts); where dedup is done also how many
        of the samples are `left`, and of each set `with_copy_left` and `samples_left`.

    Raises:
        UserError: no suites, `ingest` is not finished, a removal was interrupted, a suite or embeddings that are
            missing or not sound.
        RunError: a shard cannot be read.
    """
    if not config.decontaminate.suites:
        raise UserError("--report-only: compares with test sets; name them with --decontaminate.suites")
    folder = Folder(corpus)
    manifest = Manifest.existing(folder)
    tombstones.check_none_is_open(folder)
    if not manifest.is_done(RAW):
        raise UserError(f"{folder.url}: '{RAW}' is not finished yet; run that first")
    listed = list_suites(config.decontaminate.suites)
    stage = FINAL if manifest.is_done(FINAL) and not committed(folder / RAW) else RAW
    signatures = _signatures(folder, manifest, stage, cluster)
    stays = _stays(folder, signatures) if stage == RAW and manifest.is_done(DEDUP) else None
    path = config.decontaminate.embeddings and config.semantic.embeddings
    embeddings = load_embeddings(path, signatures.keys, scratch=config.semantic.scratch) if path else None
    framing = Framing.of(manifest.config(RAW))

    def look(samples: npt.NDArray[np.int64]) -> Thumbnails:
        return thumbnails(folder / stage, signatures.shards, Places.of(signatures, samples))

    found = find_overlap(listed, signatures, embeddings, look, framing, config, cluster, stays)
    left = {} if stays is None else {"left": int(stays.sum())}
    return {"corpus": folder.url, "samples": len(signatures), **left, "test_sets": found.by_suite(stays)}


class SignatureReader:
    """Reads a shard's signatures, or makes them, and writes none; a Ray actor holds one."""

    def __init__(self, corpus: str, stage: str) -> None:
        self.there, self.stage = Folder(corpus) / DEDUP / SIGNATURES, stage
        self.writer = SignatureWriter(corpus, stage=stage)

    def run(self, shard: str) -> pa.Table:
        """Return the signatures of a shard. Raises RunError if a picture cannot be decoded."""
        if self.stage == RAW and self.there.exists(f"{shard}.parquet"):
            table = pq.read_table(io.BytesIO(self.there.read(f"{shard}.parquet")))
            if table.schema == SCHEMA:  # of this version
                return table
        return self.writer.made(shard)


def _signatures(folder: Folder, manifest: Manifest, stage: str, cluster: ClusterConfig) -> Signatures:
    shards, tables = manifest.shards(stage), dict[str, pa.Table]()
    with progress("dedup: signatures", len(shards), "shards") as meter:
        for shard, table in few_or_on_ray(SignatureReader, (folder.url, stage), shards, cluster):
            tables[shard] = table
            meter.advance(1)
    return of_tables(shards, [tables[shard] for shard in shards])


def _stays(folder: Folder, signatures: Signatures) -> npt.NDArray[np.bool_]:
    """Tell of samples `[N]` which dedup has left."""
    table = pq.read_table(io.BytesIO((folder / DEDUP).read(REMOVED)), columns=["key"])
    return ~np.isin(signatures.keys, np.asarray(table["key"].to_pylist(), dtype=np.str_))
