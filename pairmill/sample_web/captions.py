"""Captions as a web page's alt text would have them, and the useless ones that many pages have instead."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from pairmill.sample_web.archive import FAMILIES, Picture

Form = Callable[[str, Sequence[str]], str]

EMPTY = ("", " ", "\t", "\n ")
TOO_SHORT = ("a", "x", "1", "?", "I", "Z", "•", "é")
BOILERPLATE = (
    "click to enlarge",
    "Click to enlarge",
    "Click image to enlarge",
    "View larger image",
    "Image not available",
    "No image available",
    "placeholder image",
    "loading...",
)


def caption(picture: Picture, *, seed: int, variant: int = 0) -> str:
    """The picture's caption: its real name, mostly with some of its tags, in one of a handful of forms.

    Families of one concept get different forms and different tags. `variant` gives another caption of the
    same picture, as a second page that shows it would.
    """
    order = list(range(len(FORMS)))
    random.Random(f"form/{seed}/{picture.hexcode}").shuffle(order)
    form = FORMS[order[(FAMILIES.index(picture.family) + 2 * variant) % len(FORMS)]]
    if picture.name.lower().startswith("copyright"):
        form = _picture_of  # "Copyright ..." is what text filters take for a page's furniture
    draw = random.Random(f"tags/{seed}/{picture.key}/{variant}")
    spoken = [tag for tag in picture.tags if tag.lower() != picture.name.lower()]
    tags = draw.sample(spoken, min(len(spoken), draw.randint(2, 4)))
    return form(picture.name, tags)


def file_name_caption(draw: random.Random) -> str:
    """A caption that is only the file's name, as cameras and screenshot tools give it."""
    number = draw.randint(1, 9999)
    names = (
        f"IMG_{number:04d}.jpg",
        f"DSC{number:05d}.JPG",
        f"DSC_{number:04d}.jpeg",
        f"image{number:03d}.png",
        f"P10{number:05d}.JPG",
        f"screenshot-2021-03-{number % 28 + 1:02d}.png",
    )
    return draw.choice(names)


def _bare(name: str, tags: Sequence[str]) -> str:
    # A word of three letters is a caption that text filters drop, rightly; pages add a word to it.
    return name if len(name) >= 10 and " " in name else f"{name} emoji"


def _emoji(name: str, tags: Sequence[str]) -> str:
    return f"{_capital(name)} emoji"


def _listed(name: str, tags: Sequence[str]) -> str:
    return f"{name}: {', '.join(tags)}" if tags else f"{name} picture"


def _dashed(name: str, tags: Sequence[str]) -> str:
    return f"{_capital(name)} - {', '.join(tags)}" if tags else f"{_capital(name)} - emoji"


def _icon(name: str, tags: Sequence[str]) -> str:
    return f"{name} icon, {' '.join(tags[:2])}" if tags else f"{name} icon"


def _picture_of(name: str, tags: Sequence[str]) -> str:
    return f"Picture of {name} ({', '.join(tags[:2])})" if tags else f"Picture of {name}"


def _capital(name: str) -> str:
    return name[:1].upper() + name[1:]


FORMS: tuple[Form, ...] = (_bare, _emoji, _listed, _dashed, _icon, _picture_of)
