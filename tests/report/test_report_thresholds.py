"""What the report shows of thresholds and components, of corpora that dedup really went over."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from playwright.sync_api import Browser

from dedup.config import DedupConfig, SemanticConfig
from dedup.run import dedup
from dedup.takedown import remove
from infra.cluster import session
from infra.storage import Folder
from pairmill.report import build
from pairmill.report.thresholds import SHOWN
from shards.layout import DEDUP, THRESHOLDS
from shards.manifest import Manifest
from tests.dedup.corpora import LOCAL, Row, copies, encoded, picture, row_of, write_corpus
from tests.report.test_report_page import opened

ANIMALS = ("noto-1f98a", "noto-1f437", "noto-1f43b", "noto-1f42f", "noto-1f430", "noto-1f438")


@pytest.fixture(scope="module", autouse=True)
def one_ray() -> Iterator[None]:
    """One local Ray for all tests here: the stage uses the connection it finds."""
    with session(LOCAL):
        yield


def near_pairs(count: int) -> list[Row]:
    """Pairs 29 to 36 bits apart, of equal pictures and of others in turn; five copies of one more."""
    draw, rows = np.random.default_rng(0), []
    for number in range(count):
        one = draw.integers(0, 2, 256, dtype=np.uint8)
        other = one.copy()
        other[draw.choice(256, 29 + number % 8, replace=False)] ^= 1
        for side, bits in enumerate((one, other)):
            name = ANIMALS[(number + side * (number % 2)) % len(ANIMALS)]
            fields = {"phash": np.packbits(bits).tobytes().hex(), "phash_quality": 100, "sha256": f"{len(rows):064x}"}
            rows.append(row_of(encoded(picture(name), "JPEG", quality=70), f"<b>animal</b> {number}", **fields))
    return [*rows, *copies()]


def with_embeddings(path: Path, samples: int, width: int) -> SemanticConfig:
    """Vectors in a plane, 17 and 19 degrees apart in turn: cosines of 0.956 and 0.946."""
    angles = np.radians(np.cumsum([17 if number % 2 else 19 for number in range(samples)]))
    keys = [f"{number // width:05d}{number % width:04d}" for number in range(samples)]
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).tolist()
    pq.write_table(pa.table({"key": keys, "embedding": vectors}), path)
    return SemanticConfig(embeddings=str(path), threshold=0.95)


def report(corpus: str, path: Path) -> str:
    return Path(build(corpus, None, str(path / "report.html"))).read_text()


@pytest.mark.parametrize("width", [1280, 420])
def test_pairs_are_shown_side_by_side(browser: Browser, tmp_path: Path, width: int) -> None:
    pytest.importorskip("faiss")
    corpus = write_corpus(tmp_path / "corpus", near_pairs(48), 40)
    semantic = with_embeddings(tmp_path / "embeddings.parquet", 9, 40)
    totals = dedup(corpus, DedupConfig(semantic=semantic), LOCAL)
    with opened(browser, build(corpus, None, str(tmp_path / "report.html")), width) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == width
        section = page.locator("section#thresholds")
        look, shown = section.locator(".threshold").nth(0), section.locator(".threshold").nth(1)
        assert look.locator(".pairs").count() == shown.locator(".pairs").count() == 2
        assert look.locator(".pairs").nth(0).locator(".pair").count() == SHOWN
        within, beyond = look.locator(".pairs").all_inner_texts()
        assert "31 bits apart" in within
        assert "32 bits apart" not in within
        assert "32 bits apart" in beyond
        assert "31 bits apart" not in beyond
        assert "second look: another" in within
        assert "second look: same" in beyond
        assert "lower --distance" in look.inner_text()
        assert "raise --semantic.threshold" in shown.inner_text()
        assert [text[:11] for text in shown.locator(".pairs").all_inner_texts()] == ["cosine 0.95", "cosine 0.94"]
        assert page.locator("section#thresholds .tile.none").count() == 0
        pictures = page.evaluate("() => [...document.querySelectorAll('.pair img')].map(i => i.naturalWidth)")
        assert len(pictures) > 4 * SHOWN
        assert min(pictures) > 0
        duplicates = page.locator("section#duplicates").inner_text()
        assert f"perceptual\t{totals['by_reason']['duplicate_perceptual']}\t" in duplicates
        assert "Removed for their look, by distance" in duplicates
        assert "Removed for their embeddings, by cosine" in duplicates
        assert page.locator("section#duplicates .component").count() == min(10, totals["components"])
        assert page.locator("section#duplicates .component .tile.none").count() == 0
        assert page.locator(".warning").count() == 0


def test_a_giant_component_is_warned_of(tmp_path: Path) -> None:
    body = encoded(picture("noto-1f98a"))
    rows = [row_of(body, sha256=f"{number:064x}") for number in range(101)]
    corpus = write_corpus(tmp_path / "corpus", rows, 60)
    dedup(corpus, DedupConfig(), LOCAL)
    page = report(corpus, tmp_path)
    assert "One component holds 101 of 101 samples (100%): a giant component is the sign of a bad threshold" in page
    assert '<section id="thresholds">' not in page  # all are equal: there is no pair near the threshold


def test_without_pairs_or_from_an_earlier_version_there_is_no_section(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", near_pairs(4), 40)
    totals = dedup(corpus, DedupConfig(), LOCAL)
    folder = Folder(corpus) / DEDUP
    assert '<section id="thresholds">' in report(corpus, tmp_path)
    table = pq.read_table(io.BytesIO(folder.read(THRESHOLDS)))
    buffer = io.BytesIO()
    pq.write_table(table.slice(0, 0), buffer)
    folder.write(THRESHOLDS, buffer.getvalue())
    assert '<section id="thresholds">' not in report(corpus, tmp_path)
    folder.delete(THRESHOLDS)
    new = ("distances", "cosines", "component_sizes", "largest_components")
    older: dict[str, Any] = {name: value for name, value in totals.items() if name not in new}
    Manifest.existing(Folder(corpus)).amend({DEDUP: older})
    page = report(corpus, tmp_path)
    assert '<section id="thresholds">' not in page
    assert "The largest components" not in page
    assert "Could not be read" not in page


def test_after_a_take_down_components_are_told_as_dedup_found_them(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", copies(), 10)
    found = dedup(corpus, DedupConfig(), LOCAL)
    assert "Samples taken down since" not in report(corpus, tmp_path)
    (tmp_path / "list").write_text("key 000000000\nkey 000000003\nkey 000000006\n")
    gone = remove(corpus, str(tmp_path / "list"), LOCAL)["samples"]
    totals = Manifest.existing(Folder(corpus)).totals(DEDUP)
    assert (totals["taken_down"], totals["rows_in"] + gone) == (gone, found["rows_in"]) == (gone, 7)
    as_found = ("components", "largest_component", "component_sizes", "distances", "unhashed")
    assert {name: totals[name] for name in as_found} == {name: found[name] for name in as_found}
    page = report(corpus, tmp_path)
    assert f"Samples taken down since: {gone}. Distances, components and test pictures are told as they were" in page
    assert "<b>5</b> samples, 71.4% of all" in page
    remove(corpus, str(tmp_path / "list"), LOCAL)
    (tmp_path / "list").write_text("key 000000001\n")
    remove(corpus, str(tmp_path / "list"), LOCAL)
    assert Manifest.existing(Folder(corpus)).totals(DEDUP)["taken_down"] == gone + 1


def test_a_torn_file_of_pairs_is_named(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", near_pairs(2), 40)
    dedup(corpus, DedupConfig(), LOCAL)
    (Folder(corpus) / DEDUP).write(THRESHOLDS, b"torn")
    page = report(corpus, tmp_path)
    assert f"Could not be read: {Folder(corpus).url}/{DEDUP}/{THRESHOLDS}" in page


def test_a_sample_that_has_gone_leaves_an_empty_tile(tmp_path: Path) -> None:
    """The raw shards may be removed once the final ones are made."""
    corpus = write_corpus(tmp_path / "corpus", near_pairs(4), 5)
    dedup(corpus, DedupConfig(), LOCAL)
    for one in (tmp_path / "corpus" / "raw").glob("00001*"):
        one.unlink()
    page = report(corpus, tmp_path)
    section = page.partition('<section id="thresholds">')[2].partition("</section>")[0]
    assert (section.count("<img"), section.count("no picture")) == (5, 3)
