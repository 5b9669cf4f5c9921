"""Detail: copies keep it, other writing is another picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from dedup.config import DedupConfig
from dedup.confirm import thumbnail
from dedup.detail import LEAST_PX, Plane, most_left, plane
from dedup.run import dedup
from dedup.same_look import FIRST_CROPPED, LABELLED, NONE, SECOND_CROPPED, WHOLE, crops, ways
from infra.cluster import session
from tests.dedup.corpora import LOCAL, encoded, picture, removed, row_of, write_corpus
from tests.dedup.test_same_look import COPIES, photographs

CONFIG = DedupConfig()
MOST = CONFIG.confirm_detail
NO_PART = np.zeros(4, np.float32)


def form(number: int, side_px: int = 400) -> Image.Image:
    """A form of one number, 5% high, as the picture has no other."""
    page = Image.new("RGB", (side_px, side_px), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(side_px // 20)
    for row in range(3):
        top = side_px * (2 + 3 * row) // 12
        pen.text((side_px // 10, top), f"Field {row}", "black", font)
        pen.rectangle((side_px // 3, top - 4, side_px * 9 // 10, top + side_px // 12), outline="black")
    pen.text((side_px // 2, side_px // 6), f"No. {number}", "black", font)
    return page


def of(image: Image.Image) -> Plane:
    return plane(encoded(image))


def left(one: Image.Image, other: Image.Image, way: int = WHOLE, part: Any = NO_PART) -> float:
    return most_left(of(one), of(other), way, np.asarray(part, np.float32))


def alike(one: Image.Image, other: Image.Image) -> bool:
    """Tell by thumbnails and detail, as `Pictures` does."""
    looks = [thumbnail(encoded(picture))[None] for picture in (one, other)]
    most = CONFIG.confirm_difference
    hows = [ways(*looks, most)]
    if hows[0].way[0] != NONE:
        hows += [crops(*looks, most, cropped) for cropped in (FIRST_CROPPED, SECOND_CROPPED)]
    return any(how.way[0] != NONE and left(one, other, int(how.way[0]), how.part[0]) <= MOST for how in hows)


@pytest.mark.parametrize("how", COPIES)
def test_copies_keep_their_detail(how: str) -> None:
    for original in [*photographs(), form(137), picture("noto-1f98a", 400)]:
        copy = COPIES[how](original)
        assert alike(original, copy)
        assert alike(copy, original)


@pytest.mark.parametrize("side_px", [150, 256, 800])
def test_another_number_is_another_picture(side_px: int) -> None:
    one, other = form(137, side_px), form(174, side_px)
    thumbnails = (thumbnail(encoded(page))[None] for page in (one, other))
    assert ways(*thumbnails, CONFIG.confirm_difference).way[0] != NONE, "in small they are the same"
    assert left(one, other) > MOST
    assert not alike(one, other)
    assert alike(one, one.resize((side_px // 2, side_px // 2), Image.Resampling.BICUBIC))


def test_what_lies_in_a_label_is_not_compared_and_all_else_is() -> None:
    one, other, part = form(137), form(137), (0.68, 0.88, 0.98, 0.98)
    ImageDraw.Draw(other).rectangle(tuple(400 * share for share in part), fill=(20, 20, 20))
    assert left(one, other, LABELLED, part) <= MOST < left(one, other)
    ImageDraw.Draw(other).text((200, 300), "No. 9", "black", ImageFont.load_default(20))
    assert left(one, other, LABELLED, part) > MOST


def test_a_crop_may_be_found_a_pixel_or_two_off() -> None:
    whole = form(137)
    part = np.array([0.02, 0.03, 0.98, 0.99], np.float32)
    cut = whole.crop(tuple(int(400 * share) for share in part))
    for off in (0, 0.004, -0.004):
        assert left(whole, cut, FIRST_CROPPED, part + off) <= MOST
    assert left(whole, cut) > MOST
    assert left(form(174), cut, FIRST_CROPPED, part) > MOST


def test_a_crop_of_nothing_is_none() -> None:
    one, other, cut = (
        thumbnail(encoded(page))[None] for page in (form(137), form(174), form(137).crop((12, 8, 396, 390)))
    )
    for cropped in (FIRST_CROPPED, SECOND_CROPPED):
        assert crops(one, other, CONFIG.confirm_difference, cropped).way[0] == NONE
    assert crops(one, cut, CONFIG.confirm_difference, FIRST_CROPPED).way[0] == FIRST_CROPPED


@pytest.mark.parametrize(("size", "side"), [((90, 400), 64), ((122, 400), 128), ((244, 250), 256), ((900, 700), 256)])
def test_a_plane_has_no_more_pixels_than_the_picture(size: tuple[int, int], side: int) -> None:
    assert of(Image.new("RGB", size)).shape == (side, side)


def test_of_tiny_pictures_there_is_nothing_more_to_tell() -> None:
    assert left(form(137, LEAST_PX), form(174)) == 0


def test_forms_that_differ_in_a_number_stay_and_their_copies_go(tmp_path: Path) -> None:
    forms = [form(number) for number in (137, 174, 471)]
    copies = [(form(137), "JPEG", {"quality": 60}), (form(174).resize((200, 200)), "PNG", {})]
    bodies = [encoded(one) for one in forms] + [encoded(one, kind, **how) for one, kind, how in copies]
    rows = [row_of(body, phash="00" * 32, phash_quality=100) for body in bodies]
    with session(LOCAL):
        blind = DedupConfig(confirm_detail=2.0)
        assert dedup(write_corpus(tmp_path / "blind", rows, 8), blind, LOCAL)["kept"] == 1
        corpus = write_corpus(tmp_path / "seen", rows, 8)
        assert dedup(corpus, DedupConfig(), LOCAL)["kept"] == 3
    assert {key: row["kept_key"] for key, row in removed(corpus).items()} == {
        "000000003": "000000000", "000000004": "000000001",
    }  # fmt: skip


def test_a_picture_is_read_as_it_is_shown() -> None:
    grey = np.asarray(Image.open(io.BytesIO(encoded(form(137, 256)))).convert("L"))
    np.testing.assert_array_equal(plane(encoded(form(137, 256))), grey)
