"""A cap on captions that say nearly the same, over a corpus."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from dedup import spread
from dedup.boilerplate import remove_boilerplate
from dedup.caption_digests import caption_digests
from dedup.choose import NOBODY, Removals
from dedup.config import DedupConfig, SemanticConfig, TextConfig
from dedup.run import dedup
from dedup.signature import SignatureWriter, load
from dedup.takedown import remove
from dedup.text import digests
from infra.cluster import session
from infra.storage import Folder
from shards.layout import RAW, Reason, sample_key
from shards.writer import committed
from tests.dedup.corpora import LOCAL, Row, encoded, picture, removed, row_of, write_corpus

PICTURES = ("noto-1f98a", "noto-1f437", "noto-1f43b", "noto-1f600", "noto-1f49b", "noto-1f34e")
CAPPED = DedupConfig(keep="first", text=TextConfig(cap=2))


@pytest.fixture(scope="module", autouse=True)
def one_ray() -> Iterator[None]:
    with session(LOCAL):
        yield


def boilerplate() -> list[Row]:
    """Six pictures under one caption but for its number, and one under another."""
    rows = [row_of(encoded(picture(key)), f"royalty free picture {n * 111} here") for n, key in enumerate(PICTURES, 1)]
    return [*rows, row_of(encoded(picture("noto-1f697")), "a red car on its own")]


def test_the_best_stay_and_the_others_go_for_the_best_one(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, boilerplate(), 3)
    totals = dedup(corpus, CAPPED, LOCAL)
    assert totals["by_reason"] == {Reason.DUPLICATE_TEXT: 4}
    assert totals["kept"] == 3
    gone = removed(corpus)
    assert set(gone) == {sample_key(0, 2), sample_key(1, 0), sample_key(1, 1), sample_key(1, 2)}
    assert {row["kept_key"] for row in gone.values()} == {sample_key(0, 0)}
    assert {(row["method"], row["cosine"]) for row in gone.values()} == {("text", None)}


def test_a_take_down_of_the_best_one_leaves_the_other_pictures(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", boilerplate(), 3)
    dedup(corpus, CAPPED, LOCAL)
    (tmp_path / "list.txt").write_text(f"key {sample_key(0, 0)}\n")
    going = remove(corpus, str(tmp_path / "list.txt"), LOCAL, dry_run=True)["going"]
    assert [one["key"] for one in going] == [sample_key(0, 0)]


def test_without_a_cap_all_stay(tmp_path: Path) -> None:
    assert dedup(write_corpus(tmp_path, boilerplate(), 3), DedupConfig(keep="first"), LOCAL)["removed"] == 0


def test_copies_go_first_and_follow_the_one_they_went_for(tmp_path: Path) -> None:
    """The fourth picture has a byte copy of the same kind of caption: both end at the best one."""
    rows = boilerplate()
    copy = row_of(encoded(picture(PICTURES[3])), "royalty free picture 999 here")
    corpus = write_corpus(tmp_path, [*rows, copy], 8)
    assert dedup(corpus, CAPPED, LOCAL)["by_reason"] == {Reason.DUPLICATE_TEXT: 5}
    gone = removed(corpus)
    assert gone[sample_key(0, 3)]["kept_key"] == gone[sample_key(0, 7)]["kept_key"] == sample_key(0, 0)


def test_a_picture_that_stood_for_one_with_a_caption_of_its_own_stays(tmp_path: Path) -> None:
    rows = boilerplate()
    copy = row_of(encoded(picture(PICTURES[3])), "a yellow face that grins from ear to ear")
    corpus = write_corpus(tmp_path, [*rows, copy], 8)
    assert dedup(corpus, CAPPED, LOCAL)["by_reason"] == {Reason.DUPLICATE_TEXT: 3, Reason.DUPLICATE_EXACT: 1}
    gone = removed(corpus)
    assert sample_key(0, 3) not in gone
    assert gone[sample_key(0, 7)]["kept_key"] == sample_key(0, 3)


def test_the_commonest_caption_leads_its_kind() -> None:
    """Two captions that are both like a third, which is the commonest, and not like each other: all are one kind."""
    common = np.arange(128)
    one, other = np.where(common < 90, common, common + 1000), np.where(common >= 38, common, common + 2000)
    of_captions = np.stack([one, common, other]).astype(np.uint16)
    caption = np.array([0, 1, 2, 1, 1])
    found = remove_boilerplate(
        Removals(
            np.full(5, NOBODY), np.zeros(5, bool), np.zeros(5, np.int32), np.arange(5),
            np.full(5, np.nan, np.float32), np.zeros(5, bool),
        ),
        np.repeat(caption[:, None], 2, axis=1).astype(np.uint64),
        np.arange(5),
        lambda samples: of_captions[caption[samples]],
        TextConfig(cap=1, similarity=0.6),
    )  # fmt: skip
    assert found.kept.tolist() == [NOBODY, 0, 0, 0, 0]


@pytest.mark.parametrize("few", [spread.FEW_TASKS, 0])
def test_digests_are_the_captions_own_wherever_they_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: int
) -> None:
    monkeypatch.setattr(spread, "FEW_TASKS", few)
    captions = ("a red fox", "two pigs", "bears asleep", "that grin", "hearts of gold", "apple pie", "cars for sale")
    rows = [row | {"caption": caption} for row, caption in zip(boilerplate(), captions, strict=True)]
    corpus = write_corpus(tmp_path, rows, 2)
    shards = committed(Folder(corpus) / RAW)
    for shard in shards:
        SignatureWriter(corpus).run(shard)
    samples = np.array([6, 0, 3, 2, 5])
    made = caption_digests(corpus, load(corpus, shards), samples, LOCAL)
    np.testing.assert_array_equal(made, digests([captions[number] for number in samples]))


def test_an_empty_corpus_has_no_captions(tmp_path: Path) -> None:
    assert dedup(write_corpus(tmp_path, [], 8), CAPPED, LOCAL)["removed"] == 0


def test_embeddings_do_not_tell_pairs(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="give it with unit 'image' alone"):
        DedupConfig(unit="pair", semantic=SemanticConfig(embeddings=str(tmp_path)))
