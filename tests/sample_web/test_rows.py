from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import pyarrow.parquet as pq
import pytest

from pairmill.sample_web import archive, captions, misbehaviour, rows

HOSTS = ("http://127.0.0.1:8001", "http://127.0.0.2:8002", "http://127.0.0.3:8003")


@pytest.fixture(scope="module")
def made() -> list[rows.Row]:
    return rows.make_rows(HOSTS, seed=3)


def test_files_agree_and_the_list_tells_nothing_of_what_is_expected(tmp_path: Path) -> None:
    manifest = rows.write_rows(tmp_path, HOSTS, share=0.1, limit=300)
    urls, expected = pq.read_table(manifest.urls), pq.read_table(manifest.expected)
    assert urls.column_names == ["url", "caption", "family", "license"]
    assert urls["url"].to_pylist() == expected["url"].to_pylist()
    assert urls.num_rows == manifest.rows == sum(manifest.by_kind.values())
    assert manifest.pictures == 300


def test_rows_are_a_function_of_the_seed() -> None:
    first = rows.make_rows(HOSTS, seed=1, limit=200)
    assert first == rows.make_rows(HOSTS, seed=1, limit=200)
    assert first != rows.make_rows(HOSTS, seed=2, limit=200)


def test_every_training_picture_has_one_row_of_its_own(made: list[rows.Row]) -> None:
    own = [row.key for row in made if row.expected_status == "success" and row.duplicate_of is None]
    assert sorted(own) == sorted(picture.key for picture in archive.select("train"))


def test_no_row_shows_a_hold_out(made: list[rows.Row]) -> None:
    held_out = {picture.key for picture in archive.load() if picture.split != "train"}
    assert not held_out & {row.key for row in made}
    assert "twemoji" not in {row.family for row in made}
    shown = {urlsplit(row.url).path.rsplit("/", 1)[-1].partition(".")[0] for row in made}
    assert not held_out & shown


def test_every_kind_is_there_and_spread_over_the_hosts(made: list[rows.Row]) -> None:
    kinds = {row.kind for row in made}
    assert kinds == {rows.GOOD, *misbehaviour.BY_KIND, *rows.DUPLICATES, *rows.BAD_CAPTIONS}
    good = [row.url for row in made if row.kind == rows.GOOD]
    for host in HOSTS:
        assert sum(url.startswith(host) for url in good) > len(good) / 4


def test_urls_differ_except_where_the_same_one_comes_twice(made: list[rows.Row]) -> None:
    urls = [row.url for row in made if row.kind != rows.DUPLICATE_URL]
    assert len(set(urls)) == len(urls)
    assert all(row.url == row.duplicate_of for row in made if row.kind == rows.DUPLICATE_URL)
    known = set(urls)
    assert all(row.duplicate_of in known for row in made if row.duplicate_of)


def test_share_zero_leaves_only_good_rows() -> None:
    made = rows.make_rows(HOSTS, share=0, limit=50)
    assert [row.kind for row in made] == [rows.GOOD] * 50


def test_kinds_can_be_chosen() -> None:
    made = rows.make_rows(HOSTS, limit=50, kinds=["not_found"])
    assert {row.kind for row in made} == {rows.GOOD, "not_found"}
    with pytest.raises(ValueError, match="unknown kinds of rows: not_fuond"):
        rows.make_rows(HOSTS, kinds=["not_fuond"])
    with pytest.raises(ValueError, match="base_urls is empty"):
        rows.make_rows([])


def test_captions_name_the_picture_and_differ_between_families() -> None:
    by_concept: dict[str, set[str]] = {}
    for picture in archive.select("train"):
        text = captions.caption(picture, seed=0)
        assert picture.name.lower() in text.lower()
        assert len(text) >= 7
        by_concept.setdefault(picture.hexcode, set()).add(text)
    several = sum(len(found) == 3 for found in by_concept.values())
    assert several > 0.9 * len(by_concept)


def test_bad_captions_are_bad(made: list[rows.Row]) -> None:
    for row in made:
        if row.kind == "caption_empty":
            assert not row.caption.strip()
        elif row.kind == "caption_too_short":
            assert len(row.caption) == 1
        elif row.kind == "caption_file_name":
            assert row.caption.rpartition(".")[2].lower() in {"jpg", "jpeg", "png"}
        else:
            assert row.kind == "caption_boilerplate" or len(row.caption) >= 7
