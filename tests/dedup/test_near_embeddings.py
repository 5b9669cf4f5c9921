"""Who goes by embeddings: only for one that stays, with all that had gone for it before, at any number of copies."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dedup import best_links, close_embeddings, near_embeddings
from dedup.choose import NOBODY, Removals
from dedup.clusters import cluster
from dedup.config import DedupConfig, SemanticConfig
from dedup.embeddings import Embeddings
from dedup.hamming import distances
from dedup.near_embeddings import remove_near
from dedup.run import dedup
from dedup.semantic import near_pairs
from dedup.signature import load
from dedup.spread import on_ray as spread_tasks
from infra.cluster import ClusterConfig, session
from infra.config import Config
from infra.errors import UserError
from infra.storage import Folder
from shards.layout import DEDUP, PLAN, RAW, REMOVED, SIDECAR, Status, sample_key, shard_name
from shards.manifest import Manifest
from shards.writer import committed, writing

faiss = pytest.importorskip("faiss")
faiss.omp_set_num_threads(1)
LOCAL = ClusterConfig(cpus=2)
NEAR = SemanticConfig(threshold=0.95, clusters=1)


def at_degrees(*angles: float) -> Any:
    """Unit vectors in a plane; a cosine of 0.95 is 18.2 degrees."""
    radians = np.radians(angles)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1)


def of(vectors: Any, has: Sequence[bool] | None = None) -> Embeddings:
    return Embeddings(np.asarray(vectors, np.float16), np.ones(len(vectors), bool) if has is None else np.asarray(has))


def nobody_went(size: int) -> Removals:
    return Removals(
        np.full(size, NOBODY), np.zeros(size, bool), np.zeros(size, np.int32), np.arange(size),
        np.full(size, np.nan, np.float32), np.zeros(size, bool),
    )  # fmt: skip


def test_of_a_chain_only_those_go_that_are_near_one_that_stays() -> None:
    """0 - 1 - 2 - 3, each near the next alone: 1 goes for 0; 2 stays, since 1 is gone; 3 goes for 2."""
    found = remove_near(nobody_went(4), of(at_degrees(0, 15, 30, 45)), np.arange(4), NEAR, LOCAL)
    assert found.kept.tolist() == [-1, 0, -1, 2]
    assert found.component.tolist() == [0, 0, 0, 0]
    assert np.allclose(
        found.cosine, [np.nan, np.cos(np.radians(15)), np.nan, np.cos(np.radians(15))], 1e-3, equal_nan=True
    )


def test_the_rank_decides_and_the_closest_that_stays_is_named() -> None:
    found = remove_near(nobody_went(4), of(at_degrees(0, 19, 10, 90)), np.array([1, 0, 3, 2]), NEAR, LOCAL)
    assert found.kept.tolist() == [-1, -1, 1, -1]


def test_equal_embeddings_go_for_their_best_and_on_to_where_it_goes() -> None:
    found = remove_near(nobody_went(5), of(at_degrees(0, 10, 10, 60, 60)), np.array([0, 2, 1, 4, 3]), NEAR, LOCAL)
    assert found.kept.tolist() == [-1, 0, 0, 4, -1]
    assert found.cosine[3] == 1


@pytest.mark.parametrize(("look_alike", "kept"), [(15, [-1, 0, 0, 0]), (100, [-1, 0, -1, 2])])
def test_an_equal_embedding_goes_on_only_where_its_look_alikes_may(look_alike: float, kept: list[int]) -> None:
    """2 equals 1, which goes for 0; 3 had gone for 2 by its look."""
    before = nobody_went(4)
    before.kept[3] = 2
    found = remove_near(before, of(at_degrees(0, 10, 10, look_alike)), np.arange(4), NEAR, LOCAL)
    assert found.kept.tolist() == kept


def test_who_went_before_goes_on_if_it_is_near_and_holds_its_keeper_if_not() -> None:
    """1 and 3 would go for 0 and 2; the look-alike 4 of 1 is near 0, the look-alike 5 of 3 is not near 2."""
    before = nobody_went(7)
    before.kept[[4, 5, 6]] = [1, 3, 1]
    before.is_exact[6] = True
    embeddings = of(at_degrees(0, 10, 90, 105, 15, 120, 10), [True] * 6 + [False])
    found = remove_near(before, embeddings, np.arange(7), NEAR, LOCAL)
    assert found.kept.tolist() == [-1, 0, -1, -1, 0, 3, 0]
    assert not found.is_exact.any()
    assert np.isnan(found.cosine[[2, 3, 5]]).all()
    assert not np.isnan(found.cosine[[1, 4, 6]]).any()


def test_nobody_goes_for_one_that_goes() -> None:
    draw = np.random.default_rng(0)
    vectors = draw.standard_normal((600, 4))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    before = nobody_went(600)
    before.kept[500:] = draw.integers(0, 500, 100)
    found = remove_near(before, of(vectors), draw.permutation(600), SemanticConfig(threshold=0.9, neighbours=30), LOCAL)
    gone = np.flatnonzero(found.kept != NOBODY)
    assert len(gone) > 200
    assert (found.kept[found.kept[gone]] == NOBODY).all()
    by_embedding = np.flatnonzero(~np.isnan(found.cosine))
    cosines = (vectors[by_embedding] * vectors[found.kept[by_embedding]]).sum(axis=1)
    assert (cosines >= 0.9 - 1e-3).all()


def test_a_warning_says_when_the_clusters_miss_pairs(caplog: pytest.LogCaptureFixture) -> None:
    draw = np.random.default_rng(0)
    vectors = draw.standard_normal((600, 6))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    with caplog.at_level(logging.WARNING):
        remove_near(nobody_went(600), of(vectors), np.arange(600), SemanticConfig(threshold=0.8, neighbours=40), LOCAL)
        assert not caplog.text
        remove_near(nobody_went(600), of(vectors), np.arange(600), SemanticConfig(threshold=0.8, neighbours=0), LOCAL)
    assert "more --semantic.neighbours than 0" in caplog.text


def test_a_dense_spot_that_borders_cut_is_looked_at_again() -> None:
    """2,000 vectors that all are near each other, in 45 clusters: a single look leaves those that borders hide."""
    draw = np.random.default_rng(0)
    vectors = np.ones(64) + 0.2 * draw.standard_normal((2000, 64))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    place, dense = draw.permutation(2000), SemanticConfig(threshold=0.9, neighbours=1)
    once, missed = near_embeddings._round(nobody_went(2000), of(vectors), place, dense, LOCAL)
    found = remove_near(nobody_went(2000), of(vectors), place, dense, LOCAL)
    stays = [int((one.kept == NOBODY).sum()) for one in (once, found)]
    assert "clusters miss" in missed
    assert stays[1] < stays[0] / 4
    gone = np.flatnonzero(found.kept != NOBODY)
    assert (found.kept[found.kept[gone]] == NOBODY).all()
    assert ((vectors[gone] * vectors[found.kept[gone]]).sum(axis=1) >= 0.9 - 1e-3).all()


def test_thousands_that_all_are_near_are_held_in_few_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """3,000 not quite equal ones make 4.5 million pairs; 64 of each are held."""
    monkeypatch.setattr(best_links, "_HELD_PAIRS", 10_000)
    draw = np.random.default_rng(0)
    vectors = np.ones(32) + 0.02 * draw.standard_normal((3000, 32))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    links = best_links.BestLinks(draw.permutation(3000))
    held = []
    for pairs in near_pairs(vectors, cluster(vectors, 1, 0, 0), 0.9, 100):
        links.add(pairs)
        held.append(sum(len(part.first) for part in links._held))
    assert links.count == 3000 * 2999 // 2
    assert max(held) <= 2 * 3000 * best_links.MOST_LINKS
    found = remove_near(nobody_went(3000), of(vectors), draw.permutation(3000), NEAR, LOCAL)
    assert (found.kept == NOBODY).sum() == 1


def test_over_the_workers_of_a_cluster_the_outcome_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and clusters are handed out in many small tasks; a spot of 200 is denser than the links that are held."""
    draw = np.random.default_rng(3)
    middles = np.repeat(draw.standard_normal((100, 16)), 8, axis=0)
    vectors = np.concatenate(
        [middles + 0.3 * draw.standard_normal((800, 16)), 1 + 0.02 * draw.standard_normal((200, 16))]
    )
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    place, config = draw.permutation(1000), SemanticConfig(threshold=0.93, clusters=20, neighbours=6)
    clusters = close_embeddings.clusters_of(vectors, config, LOCAL)
    links = close_embeddings.close_links(vectors, place, clusters, config, LOCAL)
    here = remove_near(nobody_went(1000), of(vectors), place, config, LOCAL)
    for name, value in (("FEW_VECTORS", 0), ("_VISITED_AT_ONCE", 300), ("ASSIGNED_AT_ONCE", 150)):
        monkeypatch.setattr(close_embeddings, name, value)
    tasks: list[str] = []

    def on_ray(*arguments: Any, **options: Any) -> Iterator[Any]:
        for task, found in spread_tasks(*arguments, **options):
            tasks.append(str(task))
            yield task, found

    monkeypatch.setattr(close_embeddings, "on_ray", on_ray)
    with session(LOCAL):
        assert close_embeddings.clusters_of(vectors, config, LOCAL).nearest.shape == clusters.nearest.shape
        assert close_embeddings.close_links(vectors, place, clusters, config, LOCAL).count == links.count
        assert sorted({task.split()[0] for task in tasks}) == ["clusters", "embeddings"]
        spread = remove_near(nobody_went(1000), of(vectors), place, config, LOCAL)
    assert 300 < (here.kept != NOBODY).sum() < 900
    assert spread.kept.tolist() == here.kept.tolist()
    assert spread.component.tolist() == here.component.tolist()
    np.testing.assert_allclose(spread.cosine, here.cosine, rtol=1e-6)


def test_all_equal_are_one_component_and_none_is_an_empty_corpus() -> None:
    found = remove_near(nobody_went(20_000), of(np.ones((20_000, 4)) / 2), np.arange(20_000), NEAR, LOCAL)
    assert (found.kept == NOBODY).sum() == 1
    assert not found.component.any()
    assert not len(remove_near(nobody_went(0), of(np.ones((0, 4))), np.arange(0), NEAR, LOCAL).kept)


class NoConfig(Config):
    """A stage that was told nothing."""


def write_corpus(path: Path, bodies: Sequence[bytes]) -> str:
    """A corpus whose ingest is done, two samples a raw shard."""
    folder = Folder(path)
    manifest = Manifest.open(folder)
    for stage in (PLAN, RAW):
        manifest.begin(stage, NoConfig())
        manifest.finish(stage, {"rows_in": len(bodies)})
    for shard in range(0, len(bodies), 2):
        with writing(folder / RAW, shard_name(shard // 2), SIDECAR, {}) as writer:
            for row, body in enumerate(bodies[shard : shard + 2]):
                key = sample_key(shard // 2, row)
                fields = {"caption": "a picture", "status": Status.SUCCESS.value, "reason": "", "width": 8, "height": 8}
                writer.add({"key": key, "url": f"http://x.test/{key}", **fields}, body)
    return folder.url


def write_embeddings(path: Path, keys: Sequence[str], vectors: Any) -> str:
    column = pa.array([list(one) for one in np.asarray(vectors, np.float32)], pa.list_(pa.float32(), len(vectors[0])))
    pq.write_table(pa.table({"key": keys, "embedding": column}), path)
    return str(path)


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_stage_writes_who_goes_by_embeddings(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", [png(colour) for colour in ("red", "tomato", "blue", "green")])
    keys = ["000000000", "000000001", "000010000"]
    file = write_embeddings(tmp_path / "all.parquet", keys, at_degrees(0, 10, 90))
    totals = dedup(corpus, DedupConfig(semantic=SemanticConfig(embeddings=file)), LOCAL)
    table = pq.read_table(io.BytesIO((Folder(corpus) / DEDUP).read(REMOVED)))
    (row,) = table.to_pylist()
    assert {name: row[name] for name in ("key", "kept_key", "method", "component")} == {
        "key": "000000001", "kept_key": "000000000", "method": "semantic", "component": 0,
    }  # fmt: skip
    hashes = load(corpus, committed(Folder(corpus) / RAW)).phash
    assert row["distance"] == distances(hashes[:1], hashes[1:2])[0]
    assert row["cosine"] == pytest.approx(np.cos(np.radians(10)), abs=1e-3)
    assert totals["by_reason"] == {"duplicate_semantic": 1}
    assert (totals["kept"], totals["components"], totals["unembedded"]) == (3, 1, 1)
    with pytest.raises(UserError, match=r"semantic.threshold: 0.95 there, 0.9 now"):
        dedup(corpus, DedupConfig(semantic=SemanticConfig(embeddings=file, threshold=0.9)), LOCAL)


def test_a_corpus_from_before_there_were_embeddings_is_gone_on_with(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", [png("red"), png("blue")])
    totals = dedup(corpus, DedupConfig(), LOCAL)
    assert "unembedded" not in totals
    manifest = Folder(corpus).read_json("corpus.json")
    del manifest["stages"][DEDUP]["config"]["semantic"]
    Folder(corpus).write_json("corpus.json", manifest)
    assert dedup(corpus, DedupConfig(), LOCAL) == totals
    with pytest.raises(UserError, match=r"semantic.embeddings: None there"):
        dedup(corpus, DedupConfig(semantic=SemanticConfig(embeddings="x")), LOCAL)
