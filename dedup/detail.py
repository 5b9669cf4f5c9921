"""Whether two pictures that look the same in small differ in what is small: other writing, another number.

Both are brought to 256 pixels a side, in grey, or to 128 where one of them is smaller, and compared block by block.
What is left of a block once its brightness and contrast are made the other's, or the other's its own, is held against
that contrast. Another size, format or colour leaves less than a fifth of it wherever that is most; one other digit
leaves a fifth and more, nearly always a quarter.

Measured on 451 pictures (emoji, clip art, photographs, forms, pages of text), each copied in seven ways: 0.19 at most;
and on some 700 pairs of forms, pages, posts and series that differ in writing alone, and look the same in small: 0.26
at least in one font, 0.20 in another, where 5 of 435 pairs of forms lie below 0.23 (`benchmarks/planted_copies.py`).
"""

from __future__ import annotations

import io
import itertools

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from dedup.same_look import FIRST_CROPPED, LABELLED, SECOND_CROPPED
from shards.sample import FORMATS

DETAIL_PX = 256
"""Pixels of a side; half, or a quarter, of a picture whose shorter side has fewer."""
ANY = 2.0
"""More than can be left of a block: two differ by less, whatever they are."""
LEAST_PX = 64
"""At so many a side nothing is told that the thumbnails do not tell."""
BLOCKS = 16
"""Blocks of a side."""
_NOISE = 20.0
"""Grey levels that are added to a block's contrast: a flat block has noise alone."""
_GAIN = (0.6, 1.6)
_SHIFTS = 2
"""Pixels by which a crop, as it was found in small, may be off to either side."""
_ROOM = 0.95
"""A picture of 243 pixels counts as one of 256."""

Plane = npt.NDArray[np.uint8]
Grey = npt.NDArray[np.float32]


def plane(data: bytes) -> Plane:
    """Return an encoded picture in grey, squeezed to a square: `[256, 256]`, `[128, 128]` or `[64, 64]`."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        image.draft("L", (DETAIL_PX, DETAIL_PX))
        sizes = (DETAIL_PX, DETAIL_PX // 2)
        side = next((side for side in sizes if min(image.size) >= _ROOM * side), LEAST_PX)
        grey = image if image.mode == "L" else image.convert("RGB").convert("L")
        return np.asarray(grey.resize((side, side), Image.Resampling.BILINEAR))


def most_left(one: Plane, other: Plane, way: int, part: npt.NDArray[np.float32]) -> float:
    """Return what is left of the block that differs most, as a share of its contrast, 0 and up.

    Args:
        one, other: what `plane` returns.
        way, part: how the two show the same (`same_look.Ways`). A label itself is not compared.
    """
    first = _cut(one, part) if way == FIRST_CROPPED else one.astype(np.float32)
    second = _cut(other, part) if way == SECOND_CROPPED else other.astype(np.float32)
    side = min(len(first), len(second))
    if side <= LEAST_PX:
        return 0.0
    first, second = (_blurred(_shrunk(whole, side)) for whole in (first, second))
    is_cropped = way in (FIRST_CROPPED, SECOND_CROPPED)
    tries = _shifted(first) if is_cropped else [first]
    left = np.min([_left(moved, second) for moved in tries], axis=0)
    if way == LABELLED:
        left[_touched(part)] = 0
    return float(left.max())


def _cut(whole: Plane, part: npt.NDArray[np.float32]) -> Grey:
    """Return the part (left, top, right, bottom, 0 to 1) of a plane, as large as the whole."""
    left, top, right, bottom = (len(whole) * part).tolist()
    sides = (len(whole), len(whole))
    cut = Image.fromarray(whole).resize(sides, Image.Resampling.BILINEAR, box=(left, top, right, bottom))
    return np.asarray(cut, np.float32)


def _shrunk(whole: Grey, side: int) -> Grey:
    """Return a plane of so many pixels a side, each the mean of those that it stands for."""
    return np.asarray(cv2.resize(whole, (side, side), interpolation=cv2.INTER_AREA), np.float32)


def _blurred(whole: Grey) -> Grey:
    """Return a plane without what hinges on the kernel that it was made smaller with."""
    return np.asarray(cv2.GaussianBlur(whole, (3, 3), 0, borderType=cv2.BORDER_REPLICATE), np.float32)


def _shifted(whole: Grey) -> list[Grey]:
    """Return a plane moved by up to `_SHIFTS` pixels along both sides."""
    wide, side, moves = np.pad(whole, _SHIFTS, mode="edge"), len(whole), range(2 * _SHIFTS + 1)
    return [wide[down : down + side, across : across + side] for down, across in itertools.product(moves, moves)]


def _left(one: Grey, other: Grey) -> npt.NDArray[np.float32]:
    """Return what is left of each block once one has the brightness and contrast of the other, `[BLOCKS * BLOCKS]`.

    The less of the two is taken: a picture that was made so bright that it lost contrast does not bring it back.
    """
    mine, theirs = (_shrunk(side, BLOCKS) for side in (one, other))
    powers = [_shrunk(one * one, BLOCKS) - mine * mine, _shrunk(other * other, BLOCKS) - theirs * theirs]
    common = _shrunk(one * other, BLOCKS) - mine * theirs
    left = []
    for power, wanted in (powers, powers[::-1]):
        gain = (common / np.maximum(power, 1e-3)).clip(*_GAIN)
        left.append(wanted - 2 * gain * common + gain**2 * power)
    contrast = np.sqrt(np.maximum(*powers).clip(0))
    return np.asarray(np.sqrt(np.minimum(*left).clip(0)) / (_NOISE + contrast)).ravel()


def _touched(part: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Tell which blocks a part (left, top, right, bottom, 0 to 1) touches, or comes close to."""
    low, high = np.arange(BLOCKS) / BLOCKS, (np.arange(BLOCKS) + 1) / BLOCKS
    margin = 1 / (2 * BLOCKS)
    left, top, right, bottom = part
    across = (high > left - margin) & (low < right + margin)
    down = (high > top - margin) & (low < bottom + margin)
    return (down[:, None] & across[None, :]).ravel()
