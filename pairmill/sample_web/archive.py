"""Reads the archive of real image-text pairs, and says which of them training may see.

Every picture belongs to one split, chosen when the archive was built and written in it:

- `train`: the Noto, OpenMoji and Fluent pictures of the seen concepts;
- `held_out_style`: the whole Twemoji family of the seen concepts, a style that training never sees;
- `unseen_concepts`: the pictures, in every family, of 100 concepts that training never sees.
"""

from __future__ import annotations

import functools
import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from PIL import Image

ARCHIVE = Path(str(resources.files("pairmill.sample_web") / "pairs.zip"))
FAMILIES = ("fluent", "noto", "openmoji", "twemoji")
HELD_OUT_FAMILY = "twemoji"
WHITE = (255, 255, 255)

Split = Literal["train", "held_out_style", "unseen_concepts"]


@dataclass(frozen=True)
class Picture:
    """One picture of one concept in one family's style."""

    path: str
    family: str
    hexcode: str
    name: str
    tags: tuple[str, ...]
    group: str
    license: str
    split: Split

    @property
    def key(self) -> str:
        """`FAMILY-HEXCODE`: unique in the archive and safe in a URL path."""
        return f"{self.family}-{self.hexcode}"

    def bytes(self) -> bytes:
        """The picture's file as stored: WebP with alpha, 64 or 128 pixels a side."""
        return _archive().read(self.path)

    def rgba(self, side_px: int | None = None) -> Image.Image:
        """The picture with its alpha, scaled to `side_px` a side if given."""
        image = Image.open(io.BytesIO(self.bytes())).convert("RGBA")
        if side_px is not None and image.size != (side_px, side_px):
            image = image.resize((side_px, side_px), Image.Resampling.LANCZOS)
        return image

    def image(self, side_px: int | None = None) -> Image.Image:
        """The picture on white, RGB, scaled to `side_px` a side if given."""
        drawn = self.rgba(side_px)
        canvas = Image.new("RGB", drawn.size, WHITE)
        canvas.paste(drawn, mask=drawn.getchannel("A"))
        return canvas


@dataclass(frozen=True)
class HoldOut:
    """Pictures to classify zero-shot: `names` are the classes, `targets` index them, one an image."""

    name: str
    images: tuple[bytes, ...]
    targets: tuple[int, ...]
    names: tuple[str, ...]
    families: tuple[str, ...]


@functools.cache
def load() -> tuple[Picture, ...]:
    """All pictures, in the order of their paths."""
    lines = _archive().read("pairs.jsonl").decode("utf-8").splitlines()
    return tuple(sorted((_picture(json.loads(line)) for line in lines), key=lambda picture: picture.path))


@functools.cache
def by_key() -> dict[str, Picture]:
    """All pictures by their `key`."""
    return {picture.key: picture for picture in load()}


def select(split: Split) -> tuple[Picture, ...]:
    """The pictures of one split, in the order of their paths."""
    return tuple(picture for picture in load() if picture.split == split)


def hold_outs(side_px: int = 128) -> tuple[HoldOut, HoldOut]:
    """The two sets that training never sees, as PNG files on white of `side_px` pixels a side.

    `held_out_style` has one picture a name; `unseen_concepts` has each of its 100 names in four families.
    """
    return (
        _hold_out("held_out_style", select("held_out_style"), side_px),
        _hold_out("unseen_concepts", select("unseen_concepts"), side_px),
    )


def attributions() -> str:
    """Who made the pictures and under which licences, as Markdown."""
    return _archive().read("ATTRIBUTIONS.md").decode("utf-8")


def _hold_out(name: str, pictures: Sequence[Picture], side_px: int) -> HoldOut:
    names = tuple(sorted({picture.name for picture in pictures}))
    index = {name: number for number, name in enumerate(names)}
    return HoldOut(
        name=name,
        images=tuple(_png(picture.image(side_px)) for picture in pictures),
        targets=tuple(index[picture.name] for picture in pictures),
        names=names,
        families=tuple(picture.family for picture in pictures),
    )


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _picture(record: dict[str, object]) -> Picture:
    split: Split = "train"
    if record["unseen"]:
        split = "unseen_concepts"
    elif record["family"] == HELD_OUT_FAMILY:
        split = "held_out_style"
    tags = record["tags"]
    assert isinstance(tags, list)
    fields = {field: str(record[field]) for field in ("path", "family", "hexcode", "name", "group", "license")}
    return Picture(tags=tuple(tags), split=split, **fields)


@functools.cache
def _archive() -> zipfile.ZipFile:
    return zipfile.ZipFile(ARCHIVE)
