"""Faces made unreadable, from boxes that come with the rows; the boxes' form and the look are img2dataset's."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFilter

MARGIN = 0.1
"""A box grows by this share of its longer side, each way."""
SIGMA = 0.1
"""The blur's standard deviation, as a share of the longest side of all boxes.

Both are those of Yang, Yau, Fei-Fei, Deng and Russakovsky, "A Study of Face Obfuscation in ImageNet" (2022),
section 3, as its code applies them.
"""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, each a share of the picture's width or height, 0 to 1."""


class BadBoxesError(ValueError):
    """The row's boxes are no boxes; the message says which one."""


def parse_boxes(value: Any) -> list[Box]:
    """Return the boxes of a row: from lists of four numbers, the same as JSON text, or nothing at all.

    Raises:
        BadBoxesError: it is something else, or a box has no area.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError:
            raise BadBoxesError(f"boxes that are not JSON: {value[:60]!r}") from None
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise BadBoxesError(f"boxes that are no list: {str(value)[:60]!r}")
    return [_box(one) for one in value]


def _box(value: Any) -> Box:
    is_four = isinstance(value, list | tuple) and len(value) == 4
    if not is_four or not all(isinstance(side, int | float) and math.isfinite(side) for side in value):
        raise BadBoxesError(f"a box that is not four numbers (left, top, right, bottom): {str(value)[:60]!r}")
    left, top, right, bottom = (min(1.0, max(0.0, float(side))) for side in value)
    if left >= right or top >= bottom:
        raise BadBoxesError(f"a box without an area: {str(value)[:60]!r}")
    return left, top, right, bottom


def blurred(pixels: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """Return an RGB picture with its boxes blurred, softly at their edges.

    Sizes are relative, so a picture that is blurred after its resize looks as one that was before.
    """
    if not boxes:
        return pixels
    width, height = pixels.size
    mask = Image.new("L", pixels.size)
    draw = ImageDraw.Draw(mask)
    longest = 0.0
    for left, top, right, bottom in boxes:
        side = max((right - left) * width, (bottom - top) * height)
        grown = MARGIN * side
        corners = (left * width - grown, top * height - grown, right * width + grown - 1, bottom * height + grown - 1)
        draw.rectangle([round(corner) for corner in corners], fill=255)
        longest = max(longest, side)
    sigma = max(1.0, SIGMA * longest)
    # The edge is softened by less than the inside, else a small box beside a large one would shine through.
    soft = mask.filter(ImageFilter.GaussianBlur(sigma / 3))
    return Image.composite(pixels.filter(ImageFilter.GaussianBlur(sigma)), pixels, soft)
