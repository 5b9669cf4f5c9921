"""Take-down by the look of a picture, where the sidecars have no hash: dedup has made one."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq

from dedup.config import DedupConfig
from dedup.run import dedup
from dedup.takedown import remove
from infra.cluster import session
from infra.storage import Folder
from pairmill.sample_web import archive
from shards import tombstones
from shards.layout import DEDUP, FINAL, RAW
from shards.repack import RepackConfig, repack
from shards.verify import verify
from tests.dedup import corpora
from tests.dedup.conftest import LOCAL

HASHLESS = {"phash": None, "phash_quality": None}


def test_a_picture_that_dedup_alone_has_hashed_is_found(tmp_path: Path, listed: Callable[..., str]) -> None:
    bodies = [corpora.encoded(corpora.picture(key)) for key in sorted(archive.by_key())[:1200:300]]
    rows = [corpora.row_of(body, f"picture {place}", **HASHLESS) for place, body in enumerate(bodies)]
    corpus = Folder(corpora.write_corpus(tmp_path / "corpus", rows, 2))
    where = listed(f"pdq {corpora.row_of(bodies[2])['phash']} 4")
    before = remove(corpus.url, where, LOCAL, dry_run=True)
    assert (before["samples"], before["unhashed"]) == (0, 4)
    with session(LOCAL):
        dedup(corpus.url, DedupConfig(), LOCAL)
        repack(corpus.url, RepackConfig(samples_per_shard=3), LOCAL)
    (corpus / DEDUP / "signatures").delete("00000.parquet")
    (going,) = remove(corpus.url, where, LOCAL, dry_run=True)["going"]
    assert going["phash"] == corpora.row_of(bodies[2])["phash"]
    result = remove(corpus.url, where, LOCAL)
    assert (result["samples"], result["unhashed"], result["unmatched"]) == (1, 2, [])
    assert result["shards"] == {RAW: 1, FINAL: 1}
    assert set(tombstones.all_removed(corpus)) == {"000010000"}
    for path in Path(corpus.path(FINAL)).glob("0*.parquet"):
        assert "000010000" not in [
            row["source_key"] for row in pq.read_table(io.BytesIO(path.read_bytes())).to_pylist()
            if row["status"] == "success"
        ]  # fmt: skip
    assert all(verify(corpus / stage).ok for stage in (RAW, FINAL))
