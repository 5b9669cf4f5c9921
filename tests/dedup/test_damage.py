"""Damaged files and mistyped paths: named, and nothing is lost by them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dedup.config import DecontaminateConfig, DedupConfig, SemanticConfig
from dedup.run import dedup
from infra.cluster import session
from infra.errors import RunError, UserError
from infra.storage import Folder
from shards.layout import DEDUP, RAW, SIGNATURES
from shards.manifest import Manifest
from tests.dedup.corpora import LOCAL, copies, removed, write_corpus


@pytest.fixture(scope="module", autouse=True)
def one_ray() -> Iterator[None]:
    """One local Ray for all tests here: the stage uses the connection it finds."""
    with session(LOCAL):
        yield


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def test_a_damaged_sidecar_is_named(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, copies(), 3)
    cut_short(tmp_path / RAW / "00001.parquet")
    with pytest.raises(RunError, match=r"raw/00001\.parquet: cannot be read .*pairmill verify"):
        dedup(corpus, DedupConfig(), LOCAL)


def test_a_damaged_hash_is_named(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, copies(), 3)
    path = tmp_path / RAW / "00001.parquet"
    table = pq.read_table(path)
    place = table.schema.get_field_index("phash")
    pq.write_table(table.set_column(place, "phash", pa.array(["no hash at all" * 5] * len(table), pa.string())), path)
    with pytest.raises(RunError, match=r"raw/00001\.parquet: a hash is damaged"):
        dedup(corpus, DedupConfig(), LOCAL)


def test_damaged_signatures_are_made_again(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, copies(), 3)
    totals, gone = dedup(corpus, DedupConfig(), LOCAL), removed(corpus)
    path = tmp_path / DEDUP / SIGNATURES / "00001.parquet"
    whole = path.read_bytes()
    cut_short(path)
    assert dedup(corpus, DedupConfig(), LOCAL, anew=True) == totals
    assert removed(corpus) == gone
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "options",
    [
        {"semantic": SemanticConfig(embeddings="nowhere")},
        {"decontaminate": DecontaminateConfig(corpus_embeddings="nowhere.parquet")},
    ],
    ids=["semantic", "decontaminate"],
)
def test_a_mistyped_path_costs_nothing(tmp_path: Path, options: dict[str, Any]) -> None:
    corpus = write_corpus(tmp_path, copies(), 3)
    for anew in (False, True):
        with pytest.raises(UserError, match="nowhere"):
            dedup(corpus, DedupConfig(**options), LOCAL, anew=anew)
        totals = dedup(corpus, DedupConfig(), LOCAL)
        assert Manifest.existing(Folder(corpus)).is_done(DEDUP)
    assert dedup(corpus, DedupConfig(), LOCAL) == totals
