"""Thumbnails of samples' pictures: of some at once, or read when they are first looked at, and only so many held."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dedup.choose import Indices
from dedup.config import DedupConfig
from dedup.confirm import made_at, thumbnail
from dedup.detail import ANY, Plane, most_left, plane
from dedup.same_look import FIRST_CROPPED, NONE, SECOND_CROPPED, THUMBNAIL_PX, Thumbnails, Ways, crops, ways
from dedup.signature import Signatures
from infra.storage import Folder

HELD = 32_768
"""Thumbnails held at a time, 12 kB each: 400 MB. What has had to make room is read again when it is wanted again."""
_PAIRS_AT_ONCE = 1024
_DETAILED_AT_ONCE = 256
"""Pairs whose detail is held at a time: 33 MB."""
_READERS = 8
"""Threads that read: a batch's pictures lie all over the corpus, and an object store takes its time for each."""
_NONE = -1


class Places(NamedTuple):
    """Where pictures lie in a stage's shards."""

    shard: npt.NDArray[np.integer[Any]]  # [S], a number
    offset: Indices  # [S], of the first byte
    size: Indices  # [S], in bytes

    @classmethod
    def of(cls, signatures: Signatures, samples: Indices) -> Places:
        """Return where the pictures of `samples` `[S]` lie."""
        return cls(signatures.shard[samples], signatures.image_offset[samples], signatures.image_bytes[samples])


def thumbnails(stage: Folder, shards: Sequence[str], places: Places) -> Thumbnails:
    """Return the thumbnails `[S, 64, 64, 3]` of the pictures at `places`; `shards` are the names of the stage's.

    Raises:
        RunError: a picture cannot be read or decoded.
    """
    found = np.empty((len(places.shard), THUMBNAIL_PX, THUMBNAIL_PX, 3), np.uint8)
    for row, made in _made(stage, shards, places, thumbnail):
        found[row] = made
    return found


def planes(stage: Folder, shards: Sequence[str], places: Places) -> list[Plane]:
    """Return the pictures at `places` in grey, with their detail (see `detail.plane`).

    Raises:
        RunError: a picture cannot be read or decoded.
    """
    found = dict(_made(stage, shards, places, plane))
    return [found[row] for row in range(len(found))]


def _made(
    stage: Folder, shards: Sequence[str], places: Places, make: Callable[[bytes], Plane]
) -> Iterator[tuple[int, Plane]]:
    """Yield what is made of each of the pictures, with its number."""

    def read(row: int) -> tuple[int, Plane]:
        shard, offset, size = (int(column[row]) for column in places)
        return row, made_at(stage, shards[shard], offset, size, make)

    with ThreadPoolExecutor(_READERS, thread_name_prefix="pictures") as pool:
        yield from pool.map(read, np.lexsort((places.offset, places.shard)).tolist())


class Bounds(NamedTuple):
    """How much two pictures that are the same may differ: by their thumbnails, and in detail."""

    difference: float
    detail: float

    @classmethod
    def of(cls, config: DedupConfig) -> Bounds:
        """Return those that were asked for."""
        return cls(config.confirm_difference, config.confirm_detail)


class Pictures:
    """Compares `S` pictures by their pixels, named by number; holds `HELD` thumbnails at most.

    Those whose thumbnails show the same are read once more, for what is too small there.
    """

    def __init__(self, stage: Folder, shards: Sequence[str], places: Places, bounds: Bounds) -> None:
        """Read nothing yet; `shards` are the names of the stage's."""
        self._stage, self._shards, self._places, self._bounds = stage, shards, places, bounds
        size = len(places.shard)
        self._row = np.full(size, _NONE)  # of each picture
        self._held = np.full(min(HELD, size), _NONE)  # the picture of each row
        self._pixels: Thumbnails = np.empty((len(self._held), THUMBNAIL_PX, THUMBNAIL_PX, 3), np.uint8)
        self._next = 0

    def same(self, first: Indices, second: Indices) -> npt.NDArray[np.bool_]:
        """Tell of pictures `[P]` and `[P]`, pair by pair, which are the same.

        Raises:
            RunError: a picture cannot be read or decoded.
        """
        found = np.empty(len(first), bool)
        together = min(_PAIRS_AT_ONCE, HELD // 2)
        for at in range(0, len(first), together):
            one, other = first[at : at + together], second[at : at + together]
            self._hold(np.unique(np.concatenate([one, other])))
            pixels = [self._pixels[self._row[side]] for side in (one, other)]
            found[at : at + together] = self._same(one, other, pixels[0], pixels[1])
        return found

    def _same(self, first: Indices, second: Indices, one: Thumbnails, other: Thumbnails) -> npt.NDArray[np.bool_]:
        """Tell of pairs of pictures, and their thumbnails, which show the same, in detail too."""
        how = ways(one, other, self._bounds.difference)
        found = np.asarray(how.way != NONE)
        if self._bounds.detail >= ANY:
            return found
        near = np.flatnonzero(found)
        for at in range(0, len(near), _DETAILED_AT_ONCE):
            some = near[at : at + _DETAILED_AT_ONCE]
            pictures, row = np.unique(np.concatenate([first[some], second[some]]), return_inverse=True)
            read = planes(self._stage, self._shards, Places(*(part[pictures] for part in self._places)))
            rows = row.reshape(2, -1)
            found[some] = self._agree(read, rows, Ways(how.way[some], how.part[some]))
            for cropped in (FIRST_CROPPED, SECOND_CROPPED):
                left = np.flatnonzero(~found[some])
                pairs = some[left]
                crop = crops(one[pairs], other[pairs], self._bounds.difference, cropped)
                found[pairs] = self._agree(read, rows[:, left], crop)
        return found

    def _agree(self, read: Sequence[Plane], rows: Indices, how: Ways) -> npt.NDArray[np.bool_]:
        """Tell of pairs of planes, `rows` `[2, P]`, that are alike in these ways, which agree in detail."""
        found = np.asarray(how.way != NONE)
        for pair in np.flatnonzero(found).tolist():
            one, other = (read[row] for row in rows[:, pair].tolist())
            found[pair] = most_left(one, other, int(how.way[pair]), how.part[pair]) <= self._bounds.detail
        return found

    def hold_all(self) -> None:
        """Read all of them, where `HELD` is enough: many at a time, in the order of the shards.

        Raises:
            RunError: a picture cannot be read or decoded.
        """
        if len(self._held) == len(self._row):
            self._hold(np.arange(len(self._row)))

    def _hold(self, pictures: Indices) -> None:
        """Read those of `pictures`, `HELD` at most and each named once, that are not held."""
        missing = pictures[self._row[pictures] == _NONE]
        if not len(missing):
            return
        rows = self._room(pictures, len(missing))
        self._pixels[rows] = thumbnails(self._stage, self._shards, Places(*(part[missing] for part in self._places)))
        self._held[rows], self._row[missing] = missing, rows

    def _room(self, wanted: Indices, count: int) -> Indices:
        """Empty `count` rows, those filled longest ago, but none of a picture in `wanted`."""
        rows = (self._next + np.arange(len(self._held))) % len(self._held)
        needed = self._row[wanted]
        rows = rows[~np.isin(rows, needed[needed != _NONE])][:count]
        self._next = int(rows[-1]) + 1
        before = self._held[rows]
        self._row[before[before != _NONE]] = _NONE
        self._held[rows] = _NONE
        return rows
