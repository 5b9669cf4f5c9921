"""Take-down of a sample that others had gone for: its copies go with it, other pictures are not lost by it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dedup.config import DedupConfig
from dedup.run import dedup
from dedup.takedown import remove
from infra.cluster import session
from infra.storage import Folder
from pairmill.sample_web import archive
from pairmill.status import status
from shards import tombstones
from shards.layout import DEDUP, FINAL, RAW
from shards.manifest import Manifest
from shards.repack import RepackConfig, repack
from shards.verify import verify
from tests.dedup import corpora
from tests.dedup.conftest import LOCAL

Listed = Callable[..., str]
BEST, FIRST, SECOND, COPY, OTHER = "000000000", "000000001", "000000002", "000010000", "000010001"
"""Two pictures beyond the cap or near by their embeddings to the best one, its copy, and one that nothing is near."""
REPACK = RepackConfig(samples_per_shard=1)


def rows(captions: str) -> list[corpora.Row]:
    keys = sorted(archive.by_key())
    bodies = [corpora.encoded(corpora.picture(keys[300 * place])) for place in (0, 1, 2, 0, 3)]
    told = [captions.format(place) for place in range(4)] + ["one of its own"]
    return [
        corpora.row_of(body, caption, original_width=200 - place)
        for place, (body, caption) in enumerate(zip(bodies, told, strict=True))
    ]


def config_of(method: str, path: Path) -> DedupConfig:
    if method == "text":
        return DedupConfig.model_validate({"text": {"cap": 1}})
    vectors = np.eye(8, dtype=np.float32)[[0, 0, 0, 0, 4]]
    vectors[1, 1] = vectors[2, 2] = 0.2
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    keys = [BEST, FIRST, SECOND, COPY, OTHER]
    pq.write_table(pa.table({"key": keys, "embedding": list(vectors)}), path)
    return DedupConfig.model_validate({"semantic": {"embeddings": str(path)}})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Corpora with dedup done, by method, each without `final/` and with it."""
    root = tmp_path_factory.mktemp("aside")
    found = {method: root / method for method in ("text", "semantic", "text_final", "semantic_final")}
    with session(LOCAL):
        for method in ("text", "semantic"):
            captions = "stock photo number {}" if method == "text" else "picture {}"
            corpus = corpora.write_corpus(found[method], rows(captions), 3)
            dedup(corpus, config_of(method, root / "embeddings.parquet"), LOCAL)
            told = {key: (row["kept_key"], row["method"]) for key, row in corpora.removed(corpus).items()}
            assert told == {FIRST: (BEST, method), SECOND: (BEST, method), COPY: (BEST, "exact")}
            shutil.copytree(found[method], found[f"{method}_final"])
            repack(str(found[f"{method}_final"]), REPACK, LOCAL)
    return found


@pytest.fixture
def taken(made: dict[str, Path], tmp_path: Path) -> Callable[[str], Folder]:
    return lambda name: Folder(shutil.copytree(made[name], tmp_path / name))


def totals_add_up(corpus: Folder) -> dict[str, Any]:
    totals = Manifest.existing(corpus).totals(DEDUP)
    assert totals["kept"] + totals["removed"] == totals["rows_in"] == sum(totals["by_status"].values())
    assert totals["removed"] == sum(totals["by_reason"].values()) == len(corpora.removed(corpus.url))
    return totals


@pytest.mark.parametrize(
    ("method", "back"), [("text", {FIRST}), ("semantic", {FIRST, SECOND})], ids=["text", "semantic"]
)
def test_before_repack_other_pictures_come_back(
    taken: Callable[[str], Folder], listed: Listed, method: str, back: set[str]
) -> None:
    corpus = taken(method)
    result = remove(corpus.url, listed(f"key {BEST}"), LOCAL)
    assert (result["samples"], result["back"], result["left_out"]) == (2, len(back), 0)
    assert set(tombstones.all_removed(corpus)) == {BEST, COPY}
    left = {key: row["kept_key"] for key, row in corpora.removed(corpus.url).items()}
    assert left == ({SECOND: FIRST} if method == "text" else {})
    assert totals_add_up(corpus)["kept"] == len(back) + 1
    with session(LOCAL):
        assert repack(corpus.url, REPACK, LOCAL)["samples"] == len(back) + 1
    there = [pq.read_table(path) for path in Path(corpus.path(FINAL)).glob("0*.parquet")]
    assert set(pa.concat_tables(there)["source_key"].to_pylist()) == {*back, OTHER}
    assert all(verify(corpus / stage).ok for stage in (RAW, FINAL))


def test_a_copy_that_stays_is_named(taken: Callable[[str], Folder], listed: Listed) -> None:
    corpus = taken("semantic")
    foreseen = remove(corpus.url, listed(f"key {COPY}"), LOCAL, dry_run=True)
    assert foreseen["copies_left"] == [foreseen["going"][0]["copy_left"]] == [BEST]
    assert remove(corpus.url, listed(f"key {COPY}", f"key {BEST}"), LOCAL, dry_run=True)["copies_left"] == []
    assert remove(corpus.url, listed(f"key {FIRST}"), LOCAL, dry_run=True)["copies_left"] == []
    assert remove(corpus.url, listed(f"key {COPY}"), LOCAL)["copies_left"] == [BEST]
    totals_add_up(corpus)


@pytest.mark.parametrize("method", ["text", "semantic"])
def test_what_is_laid_out_stays_as_it_is(taken: Callable[[str], Folder], listed: Listed, method: str) -> None:
    corpus = taken(f"{method}_final")
    final = Path(corpus.path(FINAL))
    result = remove(corpus.url, listed(f"key {BEST}"), LOCAL)
    assert (result["samples"], result["back"], result["left_out"]) == (2, 0, 1 if method == "text" else 2)
    assert {key: row["kept_key"] for key, row in corpora.removed(corpus.url).items()} == {FIRST: None, SECOND: None}
    totals_add_up(corpus)
    assert status(corpus.url)["stages"][FINAL]["done"]
    before = {path.name: path.read_bytes() for path in final.glob("0*") if path.is_file()}
    for path in final.glob("00001*"):
        path.unlink()
    with session(LOCAL):
        again = repack(corpus.url, REPACK, LOCAL)
    assert {path.name: path.read_bytes() for path in final.glob("0*.tar")} == {
        name: data for name, data in before.items() if name.endswith(".tar")
    }
    assert (again["samples"], again["holes"]) == (1, 1)
    assert all(verify(corpus / stage).ok for stage in (RAW, FINAL))
    assert remove(corpus.url, listed(f"key {FIRST}"), LOCAL)["samples"] == 1
    totals_add_up(corpus)


def test_interrupted_it_ends_the_same(taken: Callable[[str], Folder], listed: Listed) -> None:
    """Done again after all but its last file."""
    corpus = taken("text")
    where = listed(f"key {BEST}")
    remove(corpus.url, where, LOCAL)
    before, totals = corpora.removed(corpus.url), totals_add_up(corpus)
    (corpus / "tombstones").delete("00001_done.json")
    assert remove(corpus.url, where, LOCAL)["samples"] == 2
    assert (corpora.removed(corpus.url), totals_add_up(corpus)) == (before, totals)


def test_who_has_the_very_body_goes_too(taken: Callable[[str], Folder], listed: Listed) -> None:
    """Of a picture's several captions, where pairs are the unit, those beyond the cap have its body."""
    corpus = taken("text")
    (corpus / DEDUP).delete("removed.parquet")
    content = corpus.read_json("corpus.json")
    del content["stages"][DEDUP]
    corpus.write_json("corpus.json", content)
    with session(LOCAL):
        dedup(corpus.url, DedupConfig.model_validate({"unit": "pair", "text": {"cap": 1}}), LOCAL)
    assert corpora.removed(corpus.url)[COPY]["method"] == "text"
    remove(corpus.url, listed(f"key {BEST}"), LOCAL)
    assert set(tombstones.all_removed(corpus)) == {BEST, COPY}
    assert {key: row["kept_key"] for key, row in corpora.removed(corpus.url).items()} == {SECOND: FIRST}
    totals_add_up(corpus)
