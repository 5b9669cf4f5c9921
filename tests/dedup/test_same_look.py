"""The second look: copies made as people make them, and pictures that are nearly the same and are not."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from dedup.config import DedupConfig
from dedup.confirm import thumbnail
from dedup.same_look import Thumbnails, same
from pairmill.sample_web import archive

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
MOST = DedupConfig().confirm_difference


@cache
def photographs() -> list[Image.Image]:
    folder = Path(skimage.__file__).parent / "data"
    return [Image.open(folder / name).convert("RGB").resize((400, 300)) for name in PHOTOGRAPHS]


def emoji(name: str, family: str = "noto") -> Image.Image:
    return next(one.image(128) for one in archive.load() if one.family == family and one.name == name)


def thumbnails(pictures: list[Image.Image]) -> Thumbnails:
    found = []
    for picture in pictures:
        data = io.BytesIO()
        picture.save(data, "PNG", compress_level=1)
        found.append(thumbnail(data.getvalue()))
    return np.array(found)


def encoded(picture: Image.Image, form: str, quality: int) -> Image.Image:
    data = io.BytesIO()
    picture.save(data, form, quality=quality)
    return Image.open(data).convert("RGB")


def cut(picture: Image.Image, *sides: float) -> Image.Image:
    wide, high = picture.size
    left, top, right, bottom = sides
    return picture.crop((round(left * wide), round(top * high), round((1 - right) * wide), round((1 - bottom) * high)))


def labelled(picture: Image.Image, left: float, top: float) -> Image.Image:
    copy, (wide, high) = picture.copy(), picture.size
    box = (left * wide, top * high, (left + 0.3) * wide, (top + 0.1) * high)
    ImageDraw.Draw(copy).rectangle(box, fill=(20, 20, 20))
    return copy


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "half as large": lambda picture: picture.resize([side // 2 for side in picture.size], Image.Resampling.BICUBIC),
    "JPEG": lambda picture: encoded(picture, "JPEG", 50),
    "WebP": lambda picture: encoded(picture, "WEBP", 60),
    "cropped all round": lambda picture: cut(picture, 0.025, 0.025, 0.025, 0.025),
    "cropped unevenly": lambda picture: cut(picture, 0.03, 0.01, 0, 0.045),
    "cropped at the top": lambda picture: cut(picture, 0, 0.05, 0, 0),
    "brighter": lambda picture: ImageEnhance.Brightness(picture).enhance(1.1),
    "less contrast": lambda picture: ImageEnhance.Contrast(picture).enhance(0.85),
    "more saturated": lambda picture: ImageEnhance.Color(picture).enhance(1.25),
    "grey": lambda picture: picture.convert("L").convert("RGB"),
    "a label below": lambda picture: labelled(picture, 0.35, 0.89),
    "a label above": lambda picture: labelled(picture, 0.02, 0.01),
}


@pytest.mark.parametrize("way", list(COPIES))
def test_a_copy_is_the_same_whichever_of_the_two_is_named_first(way: str) -> None:
    originals = photographs()
    one, other = thumbnails(originals), thumbnails([COPIES[way](picture) for picture in originals])
    assert same(one, other, MOST).tolist() == same(other, one, MOST).tolist() == [True] * len(originals)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("red heart", "black heart"),
        ("red heart", "blue heart"),
        ("white heart", "black heart"),
        ("red heart", "grey heart"),
        ("one o’clock", "two o’clock"),
        ("right arrow", "left arrow"),
        ("keycap: 1", "keycap: 7"),
        ("grinning face", "grinning face with big eyes"),
    ],
)
def test_what_nearly_is_the_same_is_not(first: str, second: str) -> None:
    one, other = thumbnails([emoji(first)]), thumbnails([emoji(second)])
    assert not same(one, other, MOST).any()
    assert not same(other, one, MOST).any()


def test_another_picture_is_none_in_whatever_way() -> None:
    originals = photographs()
    for change in (lambda picture: picture, ImageOps.mirror, ImageOps.invert):
        for one, other in pairwise(originals):
            assert not same(thumbnails([one]), thumbnails([change(other)]), MOST).any()


def test_a_label_in_the_middle_or_a_large_one_is_another_picture() -> None:
    original = photographs()[1]
    large = original.copy()
    ImageDraw.Draw(large).rectangle((0, 0, original.width * 0.5, original.height * 0.3), fill=(20, 20, 20))
    for changed in (labelled(original, 0.35, 0.45), large):
        assert not same(thumbnails([original]), thumbnails([changed]), MOST).any()


def test_pairs_are_told_one_by_one() -> None:
    """More pairs than are looked at together, copies and others mixed."""
    originals = thumbnails(photographs())
    draw = np.random.default_rng(0)
    first, second = draw.integers(0, len(originals), (2, 600))
    assert (same(originals[first], originals[second], MOST) == (first == second)).all()
    assert same(originals[:0], originals[:0], MOST).shape == (0,)
