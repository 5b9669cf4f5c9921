"""Take-down of a sample that several copies of one picture had gone for: that picture comes back once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dedup.config import DedupConfig
from dedup.run import dedup
from dedup.takedown import remove
from dedup.takedown_back import outlook
from infra.cluster import session
from infra.storage import Folder
from pairmill.sample_web import archive
from shards import tombstones
from shards.layout import DEDUP, FINAL, RAW
from shards.manifest import Manifest
from shards.repack import RepackConfig, repack
from tests.dedup import corpora
from tests.dedup.conftest import LOCAL

Listed = Callable[..., str]
KEPT, SAME, JPEG, BEST, OTHER, APART = "000000000", "000000001", "000000002", "000010000", "000010001", "000010002"
"""The best of all by their embeddings; three copies of one picture, of which the last is best; another picture that is
near by its embedding too; one that nothing is near."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with dedup done."""
    root = tmp_path_factory.mktemp("back")
    names = sorted(archive.by_key())
    picture = corpora.picture(names[300])
    body, jpeg = corpora.encoded(picture), corpora.encoded(picture, "JPEG", quality=60)
    others = [corpora.encoded(corpora.picture(names[300 * place])) for place in (0, 2, 3)]
    bodies = [others[0], body, jpeg, body, others[1], others[2]]
    widths = [200, 180, 170, 190, 160, 200]
    rows = [
        corpora.row_of(body, f"picture {place}", original_width=width)
        for place, (body, width) in enumerate(zip(bodies, widths, strict=True))
    ]
    corpus = corpora.write_corpus(root / "corpus", rows, 3)
    vectors = np.eye(8, dtype=np.float32)[[0, 0, 0, 0, 0, 4]]
    vectors[1:4, 1] = vectors[4, 2] = 0.2
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    keys = [KEPT, SAME, JPEG, BEST, OTHER, APART]
    pq.write_table(pa.table({"key": keys, "embedding": list(vectors)}), root / "embeddings.parquet")
    with session(LOCAL):
        config = {"semantic": {"embeddings": str(root / "embeddings.parquet")}}
        dedup(corpus, DedupConfig.model_validate(config), LOCAL)
    told = {key: (row["kept_key"], row["method"]) for key, row in corpora.removed(corpus).items()}
    assert told == dict.fromkeys((SAME, JPEG, BEST, OTHER), (KEPT, "semantic"))
    return root / "corpus"


@pytest.fixture
def corpus(made: Path, tmp_path: Path) -> Folder:
    return Folder(shutil.copytree(made, tmp_path / "corpus"))


@pytest.mark.parametrize("has_signatures", [True, False], ids=["signatures", "sidecars"])
def test_of_copies_the_best_comes_back(corpus: Folder, listed: Listed, has_signatures: bool) -> None:
    if not has_signatures:
        shutil.rmtree(corpus.path(f"{DEDUP}/signatures"))
    result = remove(corpus.url, listed(f"key {KEPT}"), LOCAL)
    assert (result["samples"], result["back"], result["left_out"]) == (1, 2, 0)
    removed = corpora.removed(corpus.url)
    told = {key: (row["kept_key"], row["method"], row["cosine"]) for key, row in removed.items()}
    assert told == {SAME: (BEST, "exact", None), JPEG: (BEST, "perceptual", None)}
    assert (removed[SAME]["distance"], removed[JPEG]["distance"] <= 31) == (0, True)
    totals = Manifest.existing(corpus).totals(DEDUP)
    assert totals["by_reason"] == {"duplicate_exact": 1, "duplicate_perceptual": 1}
    assert totals["by_status"] == {"filtered": 2, "success": 3}
    assert (totals["rows_in"], totals["kept"], totals["removed"]) == (5, 3, 2)
    with session(LOCAL):
        final = repack(corpus.url, RepackConfig(samples_per_shard=8), LOCAL)
    assert (final["rows_in"], final["by_reason"]) == (5, totals["by_reason"])
    there = pq.read_table(corpus.path(f"{FINAL}/00000.parquet"))
    assert set(there["source_key"].to_pylist()) == {BEST, OTHER, APART}
    assert len(set(there["sha256"].to_pylist())) == 3
    assert set(tombstones.all_removed(corpus)) == {KEPT}


def test_taken_down_in_turn_it_takes_its_copies_along(corpus: Folder, listed: Listed) -> None:
    remove(corpus.url, listed(f"key {KEPT}"), LOCAL)
    result = remove(corpus.url, listed(f"key {BEST}"), LOCAL)
    assert (result["samples"], result["back"]) == (3, 0)
    assert corpora.removed(corpus.url) == {}
    totals = Manifest.existing(corpus).totals(DEDUP)
    assert (totals["rows_in"], totals["kept"], totals["removed"], totals["by_reason"]) == (2, 2, 0, {})


@pytest.mark.parametrize("done", ["tombstone", "shards", "all but the last file"])
def test_interrupted_and_repeated_it_ends_in_the_same_bytes(
    made: Path, corpus: Folder, tmp_path: Path, listed: Listed, done: str
) -> None:
    """`done` is what the first attempt came to."""
    where, other = listed(f"key {KEPT}"), Folder(shutil.copytree(made, tmp_path / "other"))
    remove(other.url, where, LOCAL)
    parts = {"tombstone": ["tombstones"], "shards": ["tombstones", RAW, f"{DEDUP}/signatures"]}
    for part in parts.get(done, ["."]):
        shutil.copytree(other.path(part), corpus.path(part), dirs_exist_ok=True)
    (corpus / "tombstones").delete("00001_done.json")
    assert remove(corpus.url, where, LOCAL)["samples"] == 1
    files = sorted(path.relative_to(other.url) for path in Path(other.url).rglob("*") if path.is_file())
    assert any(path.name == "00001_done.json" for path in files)
    for path in files:
        assert (Path(corpus.url) / path).read_bytes() == (Path(other.url) / path).read_bytes(), path


def test_near_hashes_are_of_copies_where_both_went_for_one_picture(corpus: Folder) -> None:
    """Who went for different pictures was told apart by the second look, bodies aside."""
    both = outlook(corpus, {BEST: (KEPT, "semantic"), JPEG: (KEPT, "semantic")})
    assert (both.back, both.goes[JPEG].kept_key) == ([BEST], BEST)
    apart = {BEST: (KEPT, "semantic"), JPEG: (APART, "semantic"), SAME: (APART, "semantic")}
    assert outlook(corpus, apart).back == [BEST, JPEG]


def test_hashes_are_not_compared_where_dedup_did_not(corpus: Folder) -> None:
    content = corpus.read_json("corpus.json")
    content["stages"][DEDUP]["config"]["perceptual"] = False
    corpus.write_json("corpus.json", content)
    lost = dict.fromkeys((SAME, JPEG, BEST, OTHER), (KEPT, "semantic"))
    assert outlook(corpus, lost).back == [JPEG, BEST, OTHER]
