"""What the page is made of: words, numbers, pictures, charts and the accounting behind them."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from infra.storage import Folder
from pairmill.report import accounting, charts, wording
from pairmill.report.pictures import Album, thumbnail
from pairmill.report.rows import even
from pairmill.report.throughput import SHARDS_BY_ROW, throughput
from shards.layout import PLAN, RAW, SIDECAR, Reason, Status, sample_key, shard_name
from shards.writer import writing


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, form)
    return out.getvalue()


def noise(side: int, mode: str = "RGB") -> Image.Image:
    shape = (side, side, len(mode))
    return Image.fromarray(np.random.default_rng(side).integers(0, 255, shape, dtype=np.uint8), mode)


@given(st.text(max_size=600), st.integers(2, 200))
def test_plain_text_is_short_and_printable(text: str, limit: int) -> None:
    shown = wording.plain(text, limit)
    assert len(shown) <= limit
    assert shown == shown.strip()
    assert not any(ord(char) < 32 or char in "\u202a\u202b\u202d\u202e\u2066\u2067\u2068" for char in shown)
    shown.encode()


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("https://a.test:81/b/c.jpg?d=1", ("a.test:81", "/b/c.jpg?d=1")),
        ("http://a.test", ("a.test", "/")),
        ("javascript:alert(1)", ("", "javascript:alert(1)")),
        ("http://[broken", ("", "http://[broken")),
        (None, ("", "")),
    ],
)
def test_addresses_are_taken_apart(url: str | None, parts: tuple[str, str]) -> None:
    assert wording.address(url) == parts


def test_addresses_break_after_punctuation_and_stay_escaped() -> None:
    assert wording.breakable("/a<b>/c") == "/<wbr>a&lt;b&gt;/<wbr>c"


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (wording.percent(0.5), "50%"), (wording.percent(0.00065), "0.07%"), (wording.percent(0.3251), "32.5%"),
        (wording.duration(8.23), "8.2 s"), (wording.duration(3725), "1 h 2 min"), (wording.duration(180), "3 min"),
        (wording.size(999), "999 B"), (wording.size(2_301_645_824), "2.3 GB"), (wording.size(1.2e13), "12 TB"),
        (wording.number(1234), "1,234"), (wording.number(0.07161), "0.0716"), (wording.label("held_out"), "Held out"),
    ],
)  # fmt: skip
def test_figures_as_people_read_them(said: str, text: str) -> None:
    assert said == text


@pytest.mark.parametrize("body", [b"", b"<svg onload=alert(1)>", encoded(noise(64))[:300]])
def test_what_is_no_picture_is_counted(body: bytes) -> None:
    album = Album()
    assert album.take(body, "x") is None
    assert (album.shown, album.broken) == (0, 1)


def test_pictures_are_made_small_and_keep_their_transparency() -> None:
    small = encoded(noise(32))
    assert thumbnail(small) == ("png", small, (32, 32))
    kind, data, size = thumbnail(encoded(noise(700, "RGBA"))) or ("", b"", (0, 0))
    assert (kind, size) == ("webp", (128, 128))
    assert Image.open(io.BytesIO(data)).mode == "RGBA"
    assert thumbnail(encoded(Image.new("1", (9_000, 9_000)))) is None  # more pixels than are decoded


def test_full_album_takes_no_more() -> None:
    album = Album(room_bytes=25_000)
    taken = [album.take(encoded(noise(64), "JPEG"), "noise") for _ in range(20)]
    assert album.shown + album.no_room == 20
    assert album.no_room > 0
    assert sum(len(one.data) for one in taken if one) <= 25_000


@given(st.integers(0, 500), st.integers(1, 60))
def test_even_choice_is_ordered_and_spread(count: int, limit: int) -> None:
    chosen = even(range(count), limit)
    assert len(chosen) == min(count, limit)
    assert chosen == sorted(set(chosen))
    if count > limit:
        assert max(np.diff([*chosen, count])) <= -(-count // limit)


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_enclose_and_are_few(low: float, width: float) -> None:
    ticks = charts.nice_ticks(low, low + width)
    assert ticks[0] <= low + 1e-6 * width
    assert ticks[-1] >= low + width - 1e-6 * width
    assert 2 <= len(ticks) <= 7


def test_lines_are_thinned_and_broken_numbers_left_out() -> None:
    points = [(float(x), float("nan") if x % 10 == 3 else 5.0) for x in range(5_000)]
    chart = charts.lines("Loss", [("loss", "kept", points)], wording.number, wording.number, "samples")
    assert chart is not None
    assert len(chart.spots) == charts.POINTS
    assert "nan" not in chart.layers[0].path
    assert chart.latest == "5"
    assert sum(spot.width for spot in chart.spots) == pytest.approx(100, abs=0.5)
    assert charts.lines("Loss", [("loss", "kept", [])], wording.number, wording.number, "samples") is None


def test_reasons_stand_under_their_statuses() -> None:
    totals = {
        "rows_in": 20,
        "by_status": {"failed_to_download": 5, "failed_to_resize": 2, "filtered": 3, "success": 10},
        "by_reason": {"timeout": 4, "dns": 1, "decode_error": 2, "robots_txt": 1, "aspect": 2},
    }
    stage = accounting.stage(RAW, totals)
    assert stage.balances
    assert stage.kept == 10
    assert [line.name for line in stage.lines] == [
        "success", "failed to download", "timeout", "dns", "filtered", "aspect", "robots txt", "failed to resize",
        "decode error",
    ]  # fmt: skip
    planned = accounting.stage(PLAN, {"rows_in": 5, "by_status": {"planned": 3, "filtered": 1}, "by_reason": {}})
    assert planned.kept == 3
    assert not planned.balances


def test_reasons_that_do_not_add_up_stand_alone() -> None:
    totals = {"rows_in": 3, "by_status": {"failed_to_download": 3}, "by_reason": {"timeout": 1, "aspect": 1}}
    lines = accounting.stage(RAW, totals).lines
    assert [(line.name, line.tone) for line in lines if not line.is_status] == [
        ("timeout", "rejected"), ("aspect", "rejected"),
    ]  # fmt: skip


def write_shards(raw: Folder, starts: list[float], rows: int = 4) -> None:
    """Raw shards of 10 seconds each, their rows done evenly over them; the last row of each fails."""
    for shard, start in enumerate(starts):
        more = {"start_time": start, "end_time": start + 10, "bytes": 1000 * rows}
        with writing(raw, shard_name(shard), SIDECAR, more) as writer:
            for row in range(rows):
                fails = row == rows - 1
                fields = dict.fromkeys(SIDECAR.names) | {
                    "key": sample_key(shard, row), "url": "", "caption": "", "bytes": 1000,
                    "status": Status.FAILED_TO_DOWNLOAD if fails else Status.SUCCESS,
                    "reason": Reason.TIMEOUT if fails else Reason.NONE,
                    "fetched_at": datetime.fromtimestamp(start + 10 * (row + 1) / rows, UTC),
                }  # fmt: skip
                writer.add(fields, None if fails else b"image")


def test_pauses_are_cut_out_of_the_throughput(tmp_path: Path) -> None:
    """Two shards, a day's pause, two more: twenty seconds of work."""
    corpus = Folder(tmp_path)
    write_shards(corpus / RAW, [1e9, 1e9, 1e9 + 86_410, 1e9 + 86_410])
    rows, received = throughput(corpus, []).charts
    assert [mark.text for mark in rows.marks] == ["paused 24 h 0 min"]
    assert rows.latest == "mean 1"  # 16 rows in 20 seconds
    assert received.latest == "mean 800 B"
    assert rows.legend == (("success", "kept"), ("failed to download", "failed_to_download"))


def test_many_shards_are_placed_by_their_spans(tmp_path: Path) -> None:
    corpus = Folder(tmp_path)
    count = SHARDS_BY_ROW + 2
    write_shards(corpus / RAW, [1e9 + 5.0 * shard for shard in range(count)])
    found = throughput(corpus, [])
    assert found.source == f"estimated from the spans of {count} of {count} shards"
    seconds = 5 * (count - 1) + 10
    assert found.charts[0].latest == f"mean {4 * count / seconds:,.0f}"
    assert found.charts[1].latest == f"mean {wording.size(4000 * count / seconds)}"
