"""The report in a real browser: whole, loading nothing, fitting wide and narrow screens, deaf to hostile words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from infra.errors import UserError
from infra.storage import Folder
from pairmill.report import build
from shards.layout import RAW

SECTIONS = ("accounting", "kept", "rejected", "duplicates", "throughput", "training", "zero-shot")
WIDTHS = (1280, 420)
MALICE = """
() => ({
  scripts: document.scripts.length,
  handlers: [...document.querySelectorAll("*")].filter(e => e.getAttributeNames().some(n => n.startsWith("on"))).length,
  links: [...document.querySelectorAll("[href]")].map(e => e.getAttribute("href")).filter(h => !/^(#|data:,$)/.test(h)),
  sources: [...document.querySelectorAll("[src]")].map(e => e.getAttribute("src").slice(0, 11)),
  frames: document.querySelectorAll("iframe, object, embed, form, base").length,
})
"""
PICTURES = "() => [...document.images].map(i => ({alt: i.alt, width: i.naturalWidth, shown: i.clientWidth}))"
Finished = tuple[str, str]


@contextmanager
def opened(browser: Browser, path: str, width: int = 1280, scheme: Any = "light") -> Iterator[Page]:
    """Open a file, and check that nothing was complained about and nothing fetched from anywhere."""
    complaints: list[str] = []
    requests: list[str] = []
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    try:
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(Path(path).as_uri())
        yield page
        assert complaints == []
        assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    finally:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_page_is_whole_and_fits(browser: Browser, finished: Finished, tmp_path: Path, width: int, scheme: str) -> None:
    report = build(*finished, str(tmp_path / "report.html"))
    with opened(browser, report, width, scheme) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == width
        for name in SECTIONS:
            assert page.locator(f"section#{name}").is_visible()
            assert page.locator(f"section#{name} .not-yet").count() == 0
        pictures = page.evaluate(PICTURES)
        assert len(pictures) > 40
        assert all(one["alt"] and one["width"] > 0 and one["shown"] > 40 for one in pictures)
        assert max(one["width"] for one in pictures) <= 128
        assert page.locator("section#training .chart").count() == 6
        assert page.locator("section#throughput svg path").count() >= 4
        # Right, then wrong, of a suite at hand, then of one that has gone: its names are there without pictures.
        assert page.locator("section#zero-shot h4").count() == 4
        assert page.locator("section#zero-shot .tile.none").count() > 0
        assert page.locator("footer").inner_text().count("1 could not be decoded") == 1


def test_hostile_words_stay_words(browser: Browser, finished: Finished, tmp_path: Path) -> None:
    report = build(*finished, str(tmp_path / "report.html"))
    with opened(browser, report) as page:
        found = page.evaluate(MALICE)
        assert found["scripts"] == found["handlers"] == found["frames"] == 0
        assert found["links"] == []
        assert set(found["sources"]) == {"data:image/"}
        assert page.title().startswith("From 51 rows")
        text = page.locator("main").inner_text()
        assert "<script>document.title='owned'</script>" in text
        assert "javascript:document.title='owned'" in text
        assert "\u202e" not in text
        assert "x" * 300 not in page.content()


def test_pointing_at_a_chart_tells_its_numbers(browser: Browser, finished: Finished, tmp_path: Path) -> None:
    report = build(*finished, str(tmp_path / "report.html"))
    with opened(browser, report) as page:
        spots = page.locator("section#training .chart").first.locator(".spot")
        assert not spots.nth(5).locator(".tip").is_visible()
        spots.nth(5).hover()
        assert "samples" in spots.nth(5).locator(".tip").inner_text()


@pytest.mark.parametrize("stages", [["plan"], ["plan", "some"], ["plan", "ingest"], ["plan", "ingest", "dedup"]])
def test_halfway_corpus_without_a_run(browser: Browser, maker: Any, tmp_path: Path, stages: list[str]) -> None:
    """Every section is there and says what is missing."""
    for stage in stages:
        maker.ingest(2) if stage == "some" else getattr(maker, stage)()
    report = build(maker.folder.url, None, str(tmp_path / "report.html"))
    with opened(browser, report, 420) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == 420
        assert all(page.locator(f"section#{name}").is_visible() for name in SECTIONS)
        has_samples = stages != ["plan"]
        assert page.locator("section#kept .not-yet").count() == (0 if has_samples else 1)
        assert page.locator("section#throughput .chart").count() == (2 if has_samples else 0)
        assert page.locator("section#duplicates .cluster").count() == (3 if "dedup" in stages else 0)
        assert "--run RUN" in page.locator("section#training").inner_text()
        if "some" in stages:
            assert "2 of 3 shards so far" in page.locator("section#accounting").inner_text()


def test_same_corpus_gives_the_same_page(finished: Finished, tmp_path: Path) -> None:
    pages = [Path(build(*finished, str(tmp_path / name))).read_bytes() for name in ("one.html", "two.html")]
    assert pages[0] == pages[1]
    assert len(pages[0]) < 2_000_000


def test_damaged_files_are_named(finished: Finished, tmp_path: Path) -> None:
    """A torn sidecar and a missing tar cost their samples, not the report."""
    raw = Path(finished[0]) / RAW
    (raw / "00001.parquet").write_bytes(b"torn")
    (raw / "00000.tar").unlink()
    page = Path(build(*finished, str(tmp_path / "report.html"))).read_text()
    assert "Could not be read:" in page
    assert str(raw / "00001.parquet") in page
    assert str(raw / "00000.tar") in page


def test_quickstart_figures_are_in_the_headline(finished: Finished, tmp_path: Path) -> None:
    """Given by the caller, or found in the result beside corpus and run; not those of another run."""
    measured = {"seconds": {"ingest": 61, "train": 240}, "peak_memory_bytes": 2_300_000_000}
    page = Path(build(*finished, str(tmp_path / "a.html"), measured)).read_text()
    assert "5 min 1 s" in page
    assert "2.3 GB" in page
    (tmp_path / "result.json").write_text(json.dumps(measured | {"stages": []}))
    assert "2.3 GB" in Path(build(*finished, str(tmp_path / "b.html"))).read_text()
    elsewhere = Path(finished[1]).rename(tmp_path / "held_out" / "run")
    assert "2.3 GB" not in Path(build(finished[0], str(elsewhere), str(tmp_path / "c.html"))).read_text()


def test_a_suite_without_classes_is_shown_by_its_recalls(browser: Browser, maker: Any, tmp_path: Path) -> None:
    """As `pairmill eval` writes it of captions alone, and as a run logs it while it trains."""
    run = Folder(tmp_path / "run")
    logged = {"image_to_text_recall@1": 0.25, "text_to_image_recall@1": 0.2, "image_to_text_recall@5": 0.5}
    lines = [{"step": step, "samples": 64 * step, "loss": 1.0} for step in (1, 2)]
    more = [{"step": step, "samples": 64 * step, **logged} for step in (1, 2)]
    run.write("log.jsonl", "".join(json.dumps(line) + "\n" for line in lines + more).encode())
    ways = {"image_to_text": {"recall@1": 0.31, "recall@5": 0.62}, "text_to_image": {"recall@1": 0.29, "recall@5": 0.6}}
    result = {"names": 0, "images": 40, "retrieval": ways, "predictions": [], "suite": str(tmp_path / "gone")}
    (run / "evaluation").write_json("captions.json", result)
    report = build(maker.plan().folder.url, run.url, str(tmp_path / "report.html"))
    with opened(browser, report) as page:
        section = page.locator("section#zero-shot")
        assert section.locator(".not-yet").count() == section.locator(".meter").count() == 0
        assert [row.split() for row in section.locator("tr.status").all_inner_texts()] == [
            ["image", "to", "text", "31%", "62%"],
            ["text", "to", "image", "29%", "60%"],
        ]
        assert "image to text recall@1 of 40 pictures" in page.locator("header").inner_text()
        assert page.locator("section#training .chart figcaption b").all_inner_texts() == ["Loss", "Recall at 1"]


def test_no_corpus_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no corpus here"):
        build(str(tmp_path), None, str(tmp_path / "report.html"))
