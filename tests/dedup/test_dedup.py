"""The stage on real pictures: who goes for whom, however the work is cut, and after any interruption."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dedup import perceptual, second_look
from dedup.config import DedupConfig
from dedup.run import dedup
from dedup.signature import SignatureWriter, load
from infra.cluster import session
from infra.errors import UserError
from infra.lock import exclusive
from infra.storage import Folder
from shards.layout import DEDUP, RAW, REMOVED, SIGNATURES
from shards.manifest import Manifest
from shards.writer import committed
from tests.dedup.corpora import LOCAL, copies, encoded, failed_row, picture, removed, row_of, write_corpus


@pytest.fixture(scope="module", autouse=True)
def one_ray() -> Iterator[None]:
    """One local Ray for all tests here: the stage uses the connection it finds."""
    with session(LOCAL):
        yield


def test_copies_go_for_the_best_one_and_nothing_else_goes(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, copies(), 3)
    totals = dedup(corpus, DedupConfig(), LOCAL)
    gone = removed(corpus)
    assert set(gone) == {"000000000", "000010000", "000010001", "000010002"}
    assert {row["kept_key"] for row in gone.values()} == {"000020000"}
    assert {row["component"] for row in gone.values()} == {0}
    assert {row["method"] for row in gone.values()} == {"perceptual"}
    assert all(row["distance"] <= 31 for row in gone.values())
    assert totals["rows_in"] == totals["kept"] + totals["removed"] == sum(totals["by_status"].values()) == 7
    assert totals["by_reason"] == {"duplicate_perceptual": 4}
    assert (totals["components"], totals["largest_component"]) == (1, 5)
    assert Manifest.existing(Folder(corpus)).totals(DEDUP) == totals


@pytest.mark.parametrize(("keep", "kept_key"), [("first", "000000000"), ("caption", "000010000")])
def test_the_keep_policy_decides_who_stays(tmp_path: Path, keep: Any, kept_key: str) -> None:
    corpus = write_corpus(tmp_path, copies(), 3)
    dedup(corpus, DedupConfig(keep=keep), LOCAL)
    gone = removed(corpus)
    assert {row["kept_key"] for row in gone.values()} == {kept_key}
    same_bytes = {"000000000", "000010000"} - {kept_key}
    assert {key for key, row in gone.items() if row["method"] == "exact"} == same_bytes
    assert gone[same_bytes.pop()]["distance"] == 0


def test_the_outcome_does_not_depend_on_shards_or_on_where_the_work_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys follow the shards, so rows are compared by their place."""
    outcomes = []
    for number, rows_per_shard in enumerate((2, 3, 8)):
        corpus = write_corpus(tmp_path / str(number), copies(), rows_per_shard)
        if number == 1:
            monkeypatch.setattr(perceptual, "FEW_HASHES", 0)
            monkeypatch.setattr(second_look, "FEW_SAMPLES", 0)
        dedup(corpus, DedupConfig(), LOCAL)

        def place(key: str, width: int = rows_per_shard) -> int:
            return int(key[:-4]) * width + int(key[-4:])

        outcomes.append([(place(key), place(row["kept_key"]), row["distance"]) for key, row in removed(corpus).items()])
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_pictures_whose_hashes_agree_but_whose_colours_differ_both_stay(tmp_path: Path) -> None:
    rows = [row_of(encoded(picture(f"noto-{code}"))) for code in ("1f7e8", "1f7e7", "1f49b", "1f9e1")]
    assert dedup(write_corpus(tmp_path / "a", rows, 8), DedupConfig(), LOCAL)["removed"] == 0
    blind = DedupConfig(confirm=False, min_quality=0)
    assert dedup(write_corpus(tmp_path / "b", rows, 8), blind, LOCAL)["removed"] == 2


def test_flat_pictures_join_nothing_but_equal_bytes_do(tmp_path: Path) -> None:
    flat = [Image.new("RGB", (64, 64), colour) for colour in ("#888888", "#898989", "#888888")]
    corpus = write_corpus(tmp_path, [row_of(encoded(image)) for image in flat], 8)
    totals = dedup(corpus, DedupConfig(), LOCAL)
    assert totals["by_reason"] == {"duplicate_exact": 1}
    assert totals["unhashed"] == 3


def test_all_samples_equal_are_one_component(tmp_path: Path) -> None:
    body = encoded(picture("noto-1f98a"))
    rows = [row_of(body, sha256=f"{number:064x}") for number in range(300)]
    totals = dedup(write_corpus(tmp_path, rows, 100), DedupConfig(), LOCAL)
    assert (totals["kept"], totals["components"], totals["largest_component"]) == (1, 1, 300)


def test_a_corpus_without_samples_has_no_duplicates(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, [failed_row()], 8)
    assert dedup(corpus, DedupConfig(), LOCAL)["rows_in"] == 0
    assert removed(corpus) == {}


def test_rows_without_a_perceptual_hash_are_compared_by_body_alone(tmp_path: Path) -> None:
    fox = encoded(picture("noto-1f98a"))
    rows = [row_of(fox, phash=None, phash_quality=None), row_of(fox, phash=None, phash_quality=None)]
    totals = dedup(write_corpus(tmp_path, rows, 8), DedupConfig(), LOCAL)
    assert totals["by_reason"] == {"duplicate_exact": 1}


def test_an_interrupted_run_goes_on_and_a_finished_one_is_left_alone(tmp_path: Path) -> None:
    whole = write_corpus(tmp_path / "whole", copies(), 3)
    dedup(whole, DedupConfig(), LOCAL)
    corpus = write_corpus(tmp_path / "parts", copies(), 3)
    folder = Folder(corpus)
    Manifest.existing(folder).begin(DEDUP, DedupConfig())
    SignatureWriter(corpus).run(committed(folder / RAW)[0])
    (tmp_path / "parts" / DEDUP / ".tmp-removed.parquet-00").write_bytes(b"torn")
    totals = dedup(corpus, DedupConfig(), LOCAL)
    assert (folder / DEDUP).read(REMOVED) == (Folder(whole) / DEDUP).read(REMOVED)
    assert not list((tmp_path / "parts" / DEDUP).glob(".tmp-*"))
    (folder / DEDUP / SIGNATURES).delete_tree()
    assert dedup(corpus, DedupConfig(), LOCAL) == totals


def test_keys_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", [*copies(), *copies()], 6, first=99_998)
    assert dedup(corpus, DedupConfig(keep="first"), LOCAL)["removed"] > 8
    keys = load(corpus, committed(Folder(corpus) / RAW)).keys.tolist()
    assert keys == sorted(keys, key=int) != sorted(keys)
    gone = [*removed(corpus)]
    assert gone == sorted(gone, key=int) != sorted(gone)
    assert all(int(row["kept_key"]) < int(key) for key, row in removed(corpus).items())


def test_a_list_that_has_gone_is_made_again(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", copies(), 8)
    totals = dedup(corpus, DedupConfig(), LOCAL)
    before = (Folder(corpus) / DEDUP).read(REMOVED)
    (Folder(corpus) / DEDUP).delete(REMOVED)
    assert dedup(corpus, DedupConfig(), LOCAL) == totals
    assert (Folder(corpus) / DEDUP).read(REMOVED) == before


def test_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no corpus here"):
        dedup(str(tmp_path / "nothing"), DedupConfig(), LOCAL)
    corpus = write_corpus(tmp_path / "corpus", copies(), 8)
    with exclusive(Folder(corpus)), pytest.raises(UserError, match="already working"):
        dedup(corpus, DedupConfig(), LOCAL)
    dedup(corpus, DedupConfig(), LOCAL)
    with pytest.raises(UserError, match="distance: 31 there, 12 now"):
        dedup(corpus, DedupConfig(distance=12), LOCAL)
