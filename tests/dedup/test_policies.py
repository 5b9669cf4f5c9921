"""What counts as a duplicate, which of several stays, and hashes that ingest did not make."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from dedup.config import DedupConfig
from dedup.run import dedup
from dedup.signature import SignatureWriter, load
from dedup.takedown import remove
from infra.cluster import session
from infra.errors import RunError, UserError
from infra.storage import Folder
from shards.layout import DEDUP, RAW, SIGNATURES, Reason, sample_key
from shards.writer import committed
from tests.dedup.corpora import LOCAL, Row, copies, encoded, picture, removed, row_of, write_corpus


@pytest.fixture(scope="module", autouse=True)
def one_ray() -> Iterator[None]:
    """One local Ray for all tests here: the stage uses the connection it finds."""
    with session(LOCAL):
        yield


def captioned(captions: list[str], **fields: Any) -> list[Row]:
    """One picture under several captions: the same bytes twice, then encoded anew."""
    image = picture("noto-1f600")
    bodies = [encoded(image), encoded(image), encoded(image, "JPEG", quality=60), encoded(image, "WEBP", quality=70)]
    return [row_of(body, caption, **fields) for body, caption in zip(bodies, captions, strict=True)]


def test_a_pair_is_a_picture_and_its_caption(tmp_path: Path) -> None:
    rows = captioned(["A Grinning  face", "a grinning face", "ａ grinning face", "another"])
    assert dedup(write_corpus(tmp_path / "images", rows, 8), DedupConfig(keep="first"), LOCAL)["removed"] == 3
    corpus = write_corpus(tmp_path / "pairs", rows, 8)
    dedup(corpus, DedupConfig(keep="first", unit="pair"), LOCAL)
    assert {key: row["method"] for key, row in removed(corpus).items()} == {
        sample_key(0, 1): "exact", sample_key(0, 2): "perceptual",
    }  # fmt: skip


def test_the_chosen_source_is_kept(tmp_path: Path) -> None:
    rows = [row | {"origin": origin} for row, origin in zip(captioned(["x"] * 4), "badc", strict=True)]
    corpus = write_corpus(tmp_path, rows, 8)
    dedup(corpus, DedupConfig(keep="source", source_column="origin", sources=("c", "a")), LOCAL)
    assert {row["kept_key"] for row in removed(corpus).values()} == {sample_key(0, 3)}
    assert len(removed(corpus)) == 3


def test_a_take_down_leaves_the_others_their_sources(tmp_path: Path) -> None:
    rows = [row | {"origin": origin} for row, origin in zip(captioned(["x"] * 4), "badc", strict=True)]
    corpus = write_corpus(tmp_path / "corpus", [*rows, copies()[1] | {"origin": "e"}], 8)
    dedup(corpus, DedupConfig(keep="source", source_column="origin", sources=("c", "a")), LOCAL)
    (tmp_path / "list.txt").write_text(f"key {sample_key(0, 4)}\n")
    remove(corpus, str(tmp_path / "list.txt"), LOCAL)
    left = load(corpus, committed(Folder(corpus) / RAW), "origin")
    assert (left.source.tolist(), left.keys.tolist()) == (list("badc"), [sample_key(0, n) for n in range(4)])


def test_a_source_that_no_sidecar_has(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, captioned(["x"] * 4), 8)
    config = DedupConfig(keep="source", source_column="origin", sources=("c",))
    with pytest.raises(UserError, match=r"source_column: .*00000\.parquet has no column 'origin'"):
        dedup(corpus, config, LOCAL)
    with pytest.raises(ValidationError, match="give all three or none"):
        DedupConfig(keep="source")


def test_pictures_that_no_hash_was_made_of_are_hashed(tmp_path: Path) -> None:
    rows = copies()
    whole = write_corpus(tmp_path / "whole", rows, 4)
    without = write_corpus(tmp_path / "without", [row | {"phash": None, "phash_quality": None} for row in rows], 4)
    some = write_corpus(tmp_path / "some", [*rows[:3], *(row | {"phash": None} for row in rows[3:])], 4)
    totals = [dedup(corpus, DedupConfig(), LOCAL) for corpus in (whole, without, some)]
    assert totals[0]["by_reason"][Reason.DUPLICATE_PERCEPTUAL] > 0
    assert totals[0] == totals[1] == totals[2]


def test_a_picture_that_cannot_be_hashed_is_named(tmp_path: Path) -> None:
    row = copies()[0] | {"phash": None, "image": b"no picture"}
    with pytest.raises(RunError, match=r"00000\.tar: the image of 000000000 cannot be decoded"):
        dedup(write_corpus(tmp_path, [row], 8), DedupConfig(), LOCAL)


def test_signatures_of_an_earlier_version_are_made_anew(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "a", copies(), 4)
    expected = dedup(corpus, DedupConfig(), LOCAL)
    again = write_corpus(tmp_path / "b", copies(), 4)
    folder = Folder(again)
    for shard in committed(folder / RAW):
        SignatureWriter(again).run(shard)
        path = Path(again) / DEDUP / SIGNATURES / f"{shard}.parquet"
        pq.write_table(pq.read_table(path).drop_columns(["caption_digest", "source"]), path)
    assert dedup(again, DedupConfig(), LOCAL) == expected
