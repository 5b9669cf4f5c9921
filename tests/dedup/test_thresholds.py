"""The pairs that a person chooses a threshold by: on the right side, the same however the work is cut."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedup import run, thresholds
from dedup.config import DedupConfig, SemanticConfig
from dedup.embeddings import Embeddings
from dedup.run import dedup
from dedup.threshold_draw import STEPS, Draw
from dedup.thresholds import PAIRS, at_cosine
from infra.cluster import session
from infra.storage import Folder
from shards.layout import DEDUP, REMOVED, THRESHOLDS, key_address
from shards.manifest import Manifest
from tests.dedup.corpora import LOCAL, Row, copies, encoded, failed_row, picture, row_of, write_corpus

FOX, PIG, BEAR = "noto-1f98a", "noto-1f437", "noto-1f43b"


@pytest.fixture(scope="module", autouse=True)
def one_ray() -> Iterator[None]:
    """One local Ray for all tests here: the stage uses the connection it finds."""
    with session(LOCAL):
        yield


def planted(*bits: int, seed: int = 0) -> list[Row]:
    """For each of `bits` two samples whose hashes are so far apart, far from all others; odd ones look alike."""
    draw, rows = np.random.default_rng(seed), []
    for number, count in enumerate(bits):
        one = draw.integers(0, 2, 256, dtype=np.uint8)
        other = one.copy()
        other[draw.choice(256, count, replace=False)] ^= 1
        for hashed, drawn in ((one, FOX), (other, FOX if count % 2 else PIG)):
            body = encoded(picture(drawn), "JPEG", quality=60 + number)
            digest = f"{len(rows):064x}"
            rows.append(row_of(body, phash=np.packbits(hashed).tobytes().hex(), phash_quality=100, sha256=digest))
    return rows


def sheet(corpus: str) -> list[dict[str, Any]]:
    return pq.read_table(io.BytesIO((Folder(corpus) / DEDUP).read(THRESHOLDS))).to_pylist()


def place(key: str, rows_per_shard: int) -> int:
    shard, row = key_address(key)
    return shard * rows_per_shard + row


def test_planted_pairs_land_on_their_side(tmp_path: Path) -> None:
    """Those more than 8 bits from the threshold are not shown; the second look tells whose pictures differ."""
    rows = planted(1, 23, 24, 25, 31, 32, 33, 39, 40, 60)
    corpus = write_corpus(tmp_path, rows, 7)
    dedup(corpus, DedupConfig(), LOCAL)
    found = [(row["distance"], row["side"], row["same"], row["method"], row["cosine"]) for row in sheet(corpus)]
    assert found == [
        (24, "within", False, "perceptual", None), (25, "within", True, "perceptual", None),
        (31, "within", True, "perceptual", None), (32, "beyond", False, "perceptual", None),
        (33, "beyond", True, "perceptual", None), (39, "beyond", True, "perceptual", None),
    ]  # fmt: skip
    pairs = [(place(row["key"], 7), place(row["other_key"], 7)) for row in sheet(corpus)]
    assert pairs == [(4, 5), (6, 7), (8, 9), (10, 11), (12, 13), (14, 15)]


def test_the_draw_does_not_depend_on_shards_or_on_where_the_work_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = planted(*(24 + number % 16 for number in range(60)))
    outcomes = []
    for width in (7, 50, 1000):
        corpus = write_corpus(tmp_path / str(width), rows, width)
        dedup(corpus, DedupConfig(sheet=60, confirm=False), LOCAL)
        outcomes.append([(place(row["key"], width), place(row["other_key"], width), row["distance"])
                         for row in sheet(corpus)])  # fmt: skip
        monkeypatch.setattr(thresholds, "_HASHES_AT_ONCE", 11)
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert 20 < len(outcomes[0]) < 60  # half of the samples are drawn, and some of their pairs


def test_without_a_threshold_above_a_few_bits_equal_hashes_are_shown(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, planted(0, 3, 8, 9), 10)
    dedup(corpus, DedupConfig(distance=0), LOCAL)
    assert [(row["distance"], row["side"]) for row in sheet(corpus)] == [(0, "within"), (3, "beyond"), (8, "beyond")]


def test_no_pairs_and_one_picture_alone(tmp_path: Path) -> None:
    body = encoded(picture(FOX))
    equal = [row_of(body, sha256=f"{number:064x}") for number in range(40)]
    unlike = [row_of(encoded(picture(name))) for name in (FOX, PIG, BEAR)]
    for number, rows in enumerate((equal, unlike, [failed_row()])):
        corpus = write_corpus(tmp_path / str(number), rows, 10)
        dedup(corpus, DedupConfig(), LOCAL)
        assert sheet(corpus) == []


def test_no_sheet_leaves_none_behind_and_changes_nothing_else(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, copies(), 3)
    totals = dedup(corpus, DedupConfig(), LOCAL)
    folder = Folder(corpus) / DEDUP
    before = folder.read(REMOVED)
    assert folder.exists(THRESHOLDS)
    Manifest.existing(Folder(corpus)).reopen(DEDUP)
    assert dedup(corpus, DedupConfig(sheet=0), LOCAL) == totals
    assert not folder.exists(THRESHOLDS)
    assert folder.read(REMOVED) == before


def test_a_damaged_picture_beyond_the_threshold_costs_the_second_look_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = planted(33)
    rows[0]["image"] = b"no picture"
    corpus = write_corpus(tmp_path, rows, 3)
    monkeypatch.setattr(run.log, "propagate", True)
    dedup(corpus, DedupConfig(), LOCAL)
    assert [row["same"] for row in sheet(corpus)] == [None]
    assert "the image at byte" in caplog.text


def of(vectors: Any, has: Any = None) -> Embeddings:
    return Embeddings(np.asarray(vectors, np.float16), np.ones(len(vectors), bool) if has is None else has)


def test_embeddings_near_the_threshold_are_drawn_whatever_the_blocks() -> None:
    """Vectors in a plane: those 16.5 to 19.8 degrees apart have cosines of 0.93 to 0.97, about."""
    angles = np.radians(np.random.default_rng(1).permutation(np.arange(0, 180, 1.5)))
    embeddings = of(np.stack([np.cos(angles), np.sin(angles)], axis=1))
    samples = np.arange(len(angles))
    outcomes = []
    for block in (3, 7, 2048):
        semantic = SemanticConfig(threshold=0.95, block=block)
        drawn = at_cosine(embeddings, samples, DedupConfig(semantic=semantic, sheet=50))
        cosines = embeddings.cosines(drawn.first, drawn.second)
        assert len(drawn.first) == 2 * PAIRS == 2 * drawn.is_within.sum()
        assert np.array_equal(cosines >= 0.95, drawn.is_within)
        assert np.abs(cosines - 0.95).max() <= 0.02
        outcomes.append([side.tolist() for side in drawn])
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_samples_without_an_embedding_are_in_no_pair() -> None:
    has = np.arange(20) % 2 == 0
    vectors = np.zeros((20, 2))
    vectors[has] = (1, 0)
    drawn = at_cosine(of(vectors, has), np.arange(4, 20), DedupConfig(semantic=SemanticConfig(threshold=0.99)))
    assert len(drawn.first)
    assert {*drawn.first.tolist(), *drawn.second.tolist()} <= set(range(4, 20, 2))
    assert len(at_cosine(of(vectors, ~has & has), np.arange(20), DedupConfig()).first) == 0


def test_a_corpus_with_embeddings_has_both_methods(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    corpus = write_corpus(tmp_path / "corpus", planted(33, 60, 61), 10)
    angles = np.radians([0, 40, 80, 97, 130, 149])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    keys = [f"00000000{number}" for number in range(6)]
    path = str(tmp_path / "embeddings.parquet")
    pq.write_table(pa.table({"key": keys, "embedding": vectors.tolist()}), path)
    dedup(corpus, DedupConfig(semantic=SemanticConfig(embeddings=path, threshold=0.95)), LOCAL)
    found = [(row["method"], row["side"], row["key"], row["other_key"]) for row in sheet(corpus)]
    assert found == [
        ("perceptual", "beyond", keys[0], keys[1]), ("semantic", "within", keys[2], keys[3]),
        ("semantic", "beyond", keys[4], keys[5]),
    ]  # fmt: skip
    assert [row["distance"] is None for row in sheet(corpus)] == [False, True, True]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), parts=st.integers(1, 9), count=st.integers(1, 40))
def test_a_draw_does_not_depend_on_the_order_of_pairs(seed: int, parts: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, 30, (2, 400))
    first, second = first[first != second], second[first != second]
    step = (first * second) % (2 * STEPS)
    whole, cut = Draw(30, seed), Draw(30, seed)
    whole.add(first, step, first, second)
    for part in np.array_split(rng.permutation(len(first)), parts):
        cut.add(first[part], step[part], first[part], second[part])
    for one, other in zip(whole.pairs(count), cut.pairs(count), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_crowd_takes_no_more_than_its_turn() -> None:
    """One sample of ten is near a thousand others, the rest near one each: all ten are shown."""
    draw = Draw(10, 0)
    draw.add(np.zeros(1000, np.int64), np.full(1000, 3), np.zeros(1000, np.int64), np.arange(100, 1100))
    draw.add(np.arange(1, 10), np.full(9, 3), np.arange(1, 10), np.arange(2000, 2009))
    assert sorted(draw.pairs(PAIRS).first.tolist()) == list(range(10))


def test_the_near_and_the_far_of_a_side_are_shown_alike() -> None:
    step = np.repeat([0, 7], [6, 500])
    draw = Draw(506, 0)
    draw.add(np.arange(506), step, np.arange(506), np.arange(1000, 1506))
    found = draw.pairs(10).first
    assert (len(found), (found < 6).sum()) == (10, 5)
