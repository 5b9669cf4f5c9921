"""Pictures that differ in what is written on them alone: forms, a series, pages, posts."""

from __future__ import annotations

import random
from collections.abc import Callable

from PIL import Image, ImageDraw, ImageFont

EACH = 30
_SYLLABLES = ("lo", "rem", "ip", "sum", "do", "lor", "sit", "am", "et", "con", "sec", "te", "tur", "ad", "el", "it")


def kinds() -> dict[str, list[Image.Image]]:
    """Return `EACH` pictures of each kind, by its name."""
    drawn: dict[str, Callable[[random.Random], Image.Image]] = {
        "forms": _form, "series": _series, "pages": _page, "posts": _post,
    }  # fmt: skip
    return {kind: [draw(random.Random(number)) for number in range(EACH)] for kind, draw in drawn.items()}


def _form(draw: random.Random) -> Image.Image:
    """Twelve numbers of eight digits, 16 pixels high, at 600x800."""
    picture, pen = _blank((600, 800))
    pen.text((150, 30), "Application form", "black", _font(28))
    for row in range(12):
        top = 100 + 55 * row
        pen.text((40, top), f"Field {row}", "black", _font(16))
        pen.rectangle((200, top - 6, 560, top + 24), outline="black")
        pen.text((210, top), str(draw.randrange(10**8)), "black", _font(16))
    return picture


def _series(draw: random.Random) -> Image.Image:
    """One thing, under a number of three digits, 36 pixels high, at 400x400."""
    picture, pen = _blank((400, 400))
    pen.ellipse((80, 60, 320, 300), fill=(200, 60, 50))
    pen.text((150, 330), f"No. {draw.randrange(100, 1000)}", "black", _font(36))
    return picture


def _page(draw: random.Random) -> Image.Image:
    """Text of 12 pixels at 600x800."""
    picture, pen = _blank((600, 800))
    for top in range(40, 760, 17):
        pen.text((40, top), _words(draw, 14), "black", _font(12))
    return picture


def _post(draw: random.Random) -> Image.Image:
    """Five lines by one author, 24 pixels high, at 600x400."""
    picture, pen = _blank((600, 400))
    pen.ellipse((20, 20, 80, 80), fill=(40, 90, 160))
    pen.text((100, 30), "Jane Roe @jane", "black", _font(20))
    for row in range(5):
        pen.text((30, 110 + 45 * row), _words(draw, 8), "black", _font(24))
    return picture


def _words(draw: random.Random, count: int) -> str:
    return " ".join("".join(draw.choices(_SYLLABLES, k=draw.randint(1, 3))) for _ in range(count))


def _blank(size: tuple[int, int]) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    picture = Image.new("RGB", size, "white")
    return picture, ImageDraw.Draw(picture)


def _font(height_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(height_px)
