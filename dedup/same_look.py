"""Whether two thumbnails show one picture: as it is, cropped, with other colours, in grey, or with a label on it.

One of the two is brought to the other in each of these ways, and what then is left between them has to be small
everywhere. A picture that differs in a detail is another picture: the worst pixels decide, not the mean.

Brightness, contrast and saturation are taken from the pair by least squares, within bounds that keep a dark and a light
picture apart. How much is cropped, up to 5% a side, is what brings the mean brightness of columns and of rows closest.
A label is a small rectangle, off the middle, that differs nearly everywhere, and outside of which nothing does: other
writing in one place is no label, as far as 64 pixels tell. What they do not tell is for `detail.py`.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

THUMBNAIL_PX = 64
WORST_SHARE = 0.01
"""Share of pixels, those that differ most, whose mean difference decides."""
MOST_LABEL = 0.08
"""Share of the picture that a label may take."""
LEAST_OFF_CENTRE = 0.35
"""How far the middle of a label has to be from that of the picture, in widths or in heights."""
_SIDE_PX = 32
MOST_CROPPED = 0.05
"""Share of the picture's width or height that may be cut off at a side."""
_ALL = np.array([0, 0, 1, 1], np.float32)
LEAST_FILLED = 0.7
"""Share of a label's pixels that differ."""
_SHARP, _SOFT = 1.0, 2.0
"""How wide a pixel of 32 reaches: to find what is cropped, and to compare what one format or size has lost of lines."""
_CUTS = np.linspace(0, MOST_CROPPED, 9)
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_GAIN, _BIAS, _SATURATION = (0.82, 1.22), (-25.0, 25.0), (0.75, 1.35)
_GREY_GAIN, _GREY_BIAS = (0.93, 1.07), (-8.0, 8.0)
"""A copy in grey has the brightness of the coloured one, where a black heart has not that of a red one."""
_GREY_CHROMA = 6.0
_BLACK, _WHITE = 3.0, 252.0
"""Pixels beyond may have been brighter or darker than can be told."""
_FEW_PIXELS = 50
_AT_ONCE = 256

Thumbnails = npt.NDArray[np.uint8]
Views = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


NONE, WHOLE, LABELLED, FIRST_CROPPED, SECOND_CROPPED = range(5)
"""How two pictures show the same: not at all, both as a whole, all but a label, one as a part of the other."""


class Ways(NamedTuple):
    """In which way pairs of pictures show the same, `[P]`, and `[P, 4]` (left, top, right, bottom, 0 to 1): where the
    label is, or what is left of the one that is cropped.
    """

    way: npt.NDArray[np.int8]
    part: npt.NDArray[np.float32]


def same(first: Thumbnails, second: Thumbnails, most: float) -> Bools:
    """Tell of thumbnails `[P, 64, 64, 3]` and `[P, 64, 64, 3]`, pair by pair, which show the same (see `ways`)."""
    return np.asarray(ways(first, second, most).way != NONE)


def ways(first: Thumbnails, second: Thumbnails, most: float) -> Ways:
    """Tell of thumbnails `[P, 64, 64, 3]` and `[P, 64, 64, 3]`, pair by pair, in which way they show the same picture.

    Args:
        first, second: RGB, squeezed to squares.
        most: difference that still is the same picture: the mean, over colours, then over the worst 1% of pixels of
            32x32, 0 to 255.
    """
    found = Ways(np.zeros(len(first), np.int8), np.zeros((len(first), 4), np.float32))
    for at in range(0, len(first), _AT_ONCE):
        one, other = (_planes(side[at : at + _AT_ONCE]) for side in (first, second))
        way, part = found.way[at : at + len(one)], found.part[at : at + len(one)]
        whole, other_whole = _whole(one), _whole(other)
        way[_worst(_gaps(whole, other_whole)) <= most] = WHOLE
        for source, copy in ((whole, other_whole), (other_whole, whole)):
            left = np.flatnonzero(way == NONE)
            way[left[_is_copy(source[left], copy[left], most)]] = WHOLE
        left = np.flatnonzero(way == NONE)
        is_labelled, label = _label(one[left], other[left], most)
        way[left[is_labelled]], part[left[is_labelled]] = LABELLED, label[is_labelled]
        for cropped, source, copy in ((FIRST_CROPPED, one, other), (SECOND_CROPPED, other, one)):
            left = np.flatnonzero(way == NONE)
            is_copy, shown = _is_crop(source[left], copy[left], most)
            way[left[is_copy]], part[left[is_copy]] = cropped, shown[is_copy]
    return found


def crops(first: Thumbnails, second: Thumbnails, most: float, cropped: int) -> Ways:
    """Tell, as `ways` does, which pairs show the same by a crop of the one alone, `cropped`.

    What is cut off may hardly be seen in small, where both look the same as a whole. A crop of nothing is none, so that
    thousands of forms on one sheet are not each looked at once more.
    """
    found = Ways(np.zeros(len(first), np.int8), np.zeros((len(first), 4), np.float32))
    source, copy = (first, second) if cropped == FIRST_CROPPED else (second, first)
    for at in range(0, len(first), _AT_ONCE):
        some = slice(at, at + _AT_ONCE)
        is_copy, found.part[some] = _is_crop(_planes(source[some]), _planes(copy[some]), most)
        is_less = (found.part[some] != _ALL).any(axis=1)
        found.way[some] = np.where(is_copy & is_less, cropped, NONE)
    return found


def _is_crop(source: Views, copy: Views, most: float) -> tuple[Bools, npt.NDArray[np.float32]]:
    """Tell where `copy` `[P, 3, 64, 64]` is a part of `source`; which, `[P, 4]`."""
    made, shown = _cropped(source, copy)
    return _is_copy(made, _whole(copy), most), shown


def _planes(thumbnails: Thumbnails) -> Views:
    """Return thumbnails `[P, 64, 64, 3]` as `[P, 3, 64, 64]`."""
    return np.ascontiguousarray(thumbnails.transpose(0, 3, 1, 2), np.float32)


def _is_copy(source: Views, copy: Views, most: float) -> Bools:
    """Tell where `copy` `[P, 3, 32, 32]` is `source` in other colours, or in grey."""
    found = _worst(_gaps(_recoloured(source, copy), copy)) <= most
    grey = np.flatnonzero(_is_grey(copy) & ~_is_grey(source) & ~found)
    found[grey] = _worst(_grey_gaps(source[grey], copy[grey])) <= most
    return found


def _whole(pictures: Views) -> Views:
    """Return pictures `[P, 3, 64, 64]` as `[P, 3, 32, 32]`."""
    weights = _weights(_SOFT)[0]
    return np.asarray(weights @ pictures @ weights.T)


def _cropped(source: Views, copy: Views) -> tuple[Views, npt.NDArray[np.float32]]:
    """Return the parts of `source` `[P, 3, 64, 64]` that lie best on `copy`, `[P, 3, 32, 32]`; where they lie."""
    light, whole = _luma(source), _weights(_SHARP)[0]
    wanted = whole @ _luma(copy) @ whole.T
    down = _closest(light.mean(axis=2), wanted.mean(axis=2))
    across = _closest((_weights(_SHARP)[down] @ light).mean(axis=1), wanted.mean(axis=1))
    columns = _weights(_SHARP)[across].transpose(0, 2, 1)
    down = _closest((light @ columns).mean(axis=2), wanted.mean(axis=2))  # without what is cut off
    rows, columns = _weights(_SOFT)[down], _weights(_SOFT)[across].transpose(0, 2, 1)
    (top, bottom), (left, right) = (_CUTS[np.array(np.divmod(crop, len(_CUTS)))] for crop in (down, across))
    part = np.stack([left, top, 1 - right, 1 - bottom], axis=1).astype(np.float32)
    return np.asarray(rows[:, None] @ source @ columns[:, None]), part


def _closest(lines: Views, wanted: Views) -> npt.NDArray[np.int64]:
    """Return by which of the crops lines `[P, 64]` correlate best with `wanted` `[P, 32]`."""
    made = np.einsum("cij,pj->pci", _weights(_SHARP), lines, optimize=True)
    made -= made.mean(axis=2, keepdims=True)
    wanted = wanted - wanted.mean(axis=1, keepdims=True)
    alike = np.einsum("pci,pi->pc", made, wanted) / np.maximum(np.linalg.norm(made, axis=2), 1e-3)
    return np.asarray(alike.argmax(axis=1))


@cache
def _weights(width: float) -> Views:
    """Return by crop, nothing first, how the 32 pixels of a line are made of its 64, `[C, 32, 64]`.

    Each is a triangle that reaches `width` of the 32 to both sides.
    """
    before, after = (cut.reshape(-1, 1, 1) for cut in np.meshgrid(_CUTS, _CUTS, indexing="ij"))
    step = THUMBNAIL_PX * (1 - before - after) / _SIDE_PX
    middles = THUMBNAIL_PX * before + (np.arange(_SIDE_PX)[:, None] + 0.5) * step
    pixels = np.arange(THUMBNAIL_PX) + 0.5
    weights = np.clip(1 - np.abs(pixels - middles) / (width * step), 0, None)
    weights *= (pixels > THUMBNAIL_PX * before) & (pixels < THUMBNAIL_PX * (1 - after))  # the copy has nothing beyond
    return np.asarray(weights / weights.sum(axis=2, keepdims=True), np.float32)


def _luma(pictures: Views) -> Views:
    """Return the brightness of pictures `[P, 3, H, W]`, `[P, H, W]`."""
    return np.asarray(np.einsum("pcij,c->pij", pictures, _LUMA))


def _gaps(one: Views, other: Views) -> npt.NDArray[np.float32]:
    """Return by how much pictures differ, pixel by pixel, `[P, 1024]`."""
    return np.abs(one - other).mean(axis=1).reshape(len(one), _SIDE_PX * _SIDE_PX)


def _worst(gaps: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the mean of the worst 1% of pixels, `[P]`."""
    split = gaps.shape[1] - max(1, int(gaps.shape[1] * WORST_SHARE))
    result: npt.NDArray[np.float32] = np.partition(gaps, split, axis=1)[:, split:].mean(axis=1)
    return result


def _recoloured(one: Views, other: Views) -> Views:
    """Return pictures in the brightness, contrast and saturation of `other`, as far as the bounds allow."""
    bright = _brightened(_luma(one), _luma(other), _GAIN, _BIAS)
    mine, theirs = (side - _luma(side)[:, None] for side in (one, other))
    power = np.einsum("pcij,pcij->p", mine, mine)
    saturation = (np.einsum("pcij,pcij->p", mine, theirs) / np.maximum(power, 1e-3)).clip(*_SATURATION)
    return np.clip(bright[:, None] + saturation[:, None, None, None] * mine, 0, 255)


def _brightened(one: Views, other: Views, gains: tuple[float, float], biases: tuple[float, float]) -> Views:
    """Return luma `[P, 32, 32]` times a gain plus a bias, those that bring it closest to `other`."""
    told = (one > _BLACK) & (one < _WHITE) & (other > _BLACK) & (other < _WHITE)
    count = told.sum(axis=(1, 2))
    means = [(side * told).sum(axis=(1, 2)) / np.maximum(count, 1) for side in (one, other)]
    mine, theirs = ((side - mean[:, None, None]) * told for side, mean in zip((one, other), means, strict=True))
    gain = ((mine * theirs).sum(axis=(1, 2)) / np.maximum(np.square(mine).sum(axis=(1, 2)), 1e-3)).clip(*gains)
    gain = np.where(count < _FEW_PIXELS, 1, gain)
    bias = np.where(count < _FEW_PIXELS, 0, means[1] - gain * means[0]).clip(*biases)
    return np.asarray(np.clip(one * gain[:, None, None] + bias[:, None, None], 0, 255), np.float32)


def _is_grey(pictures: Views) -> Bools:
    return np.asarray(np.ptp(pictures, axis=1).max(axis=(1, 2), initial=0) <= _GREY_CHROMA)


def _grey_gaps(coloured: Views, grey: Views) -> npt.NDArray[np.float32]:
    target = _luma(grey)
    made = _brightened(_luma(coloured), target, _GREY_GAIN, _GREY_BIAS)
    return np.abs(made - target).reshape(len(grey), _SIDE_PX * _SIDE_PX)


def _label(one: Views, other: Views, most: float) -> tuple[Bools, npt.NDArray[np.float32]]:
    """Tell where all that differs in `[P, 3, 64, 64]` fills a small rectangle off the middle; which, `[P, 4]`."""
    differs = np.abs(one - other).mean(axis=1) > most
    (top, bottom), (left, right) = (_extent(np.asarray(differs.any(axis=axis))) for axis in (2, 1))
    area = (bottom - top) * (right - left)
    off = np.maximum(abs(top + bottom - THUMBNAIL_PX), abs(left + right - THUMBNAIL_PX)) / (2 * THUMBNAIL_PX)
    is_small = area <= MOST_LABEL * THUMBNAIL_PX**2
    found = is_small & (off >= LEAST_OFF_CENTRE) & (differs.sum(axis=(1, 2)) >= LEAST_FILLED * area)
    extent = np.stack([left, top, right, bottom], axis=1) / np.float32(THUMBNAIL_PX)
    return np.asarray(found), np.asarray(extent, np.float32)


def _extent(lines: Bools) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return of lines `[P, 64]` the first that is set, and the one after the last."""
    return lines.argmax(axis=1), THUMBNAIL_PX - lines[:, ::-1].argmax(axis=1)
