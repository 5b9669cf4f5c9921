"""Sizes, in pixels: which pictures are refused, and how large the others become. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from ingest.config import ImageConfig
from shards.layout import Reason, Status

STATUS_OF = {
    Reason.TOO_MANY_PIXELS: Status.FAILED_TO_RESIZE,
    Reason.TOO_SMALL: Status.FILTERED,
    Reason.TOO_LARGE_AREA: Status.FILTERED,
    Reason.ASPECT: Status.FILTERED,
}
"""The reasons that a header alone can give, and the status each leads to."""


@dataclass(frozen=True)
class Geometry:
    """What is done to a picture's size: resize to `width` by `height`, then crop to or pad to `canvas`."""

    width: int
    height: int
    canvas: tuple[int, int]
    """(width, height) of the picture kept; smaller than the resized one is a crop, larger a border."""


def size_reason(width: int, height: int, config: ImageConfig) -> Reason:
    """Return why a picture of this size is refused, `Reason.NONE` if it is not."""
    if width < 1 or height < 1:
        return Reason.DECODE_ERROR
    if width * height > config.max_pixels:
        return Reason.TOO_MANY_PIXELS
    if min(width, height) < config.min_side:
        return Reason.TOO_SMALL
    if config.max_area is not None and width * height > config.max_area:
        return Reason.TOO_LARGE_AREA
    if config.max_aspect is not None and max(width / height, height / width) > config.max_aspect:
        return Reason.ASPECT
    return Reason.NONE


def geometry(width: int, height: int, config: ImageConfig) -> Geometry:
    """Return what becomes of a picture of this size; the modes and their rounding are img2dataset's.

    `keep_ratio` and `center_crop` bring the shortest side to `size`, `keep_ratio_largest` and `border` the
    longest. With `only_if_bigger` a picture whose side in question is not above `size` stays as it is,
    neither cropped nor padded.
    """
    as_is = Geometry(width, height, (width, height))
    if config.resize == "no":
        return as_is
    by_shortest = config.resize in ("keep_ratio", "center_crop")
    side = min(width, height) if by_shortest else max(width, height)
    if config.only_if_bigger and side <= config.size:
        return as_is
    scale = config.size / side
    wide, high = max(1, round(width * scale)), max(1, round(height * scale))
    canvas = (wide, high) if config.resize.startswith("keep_ratio") else (config.size, config.size)
    return Geometry(wide, high, canvas)
