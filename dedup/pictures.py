"""Thumbnails of samples' pictures: of some at once, or read when they are first looked at, and only so many held."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dedup import same_look
from dedup.choose import Indices
from dedup.confirm import thumbnail_at
from dedup.same_look import THUMBNAIL_PX, Thumbnails
from dedup.signature import Signatures
from infra.storage import Folder

HELD = 32_768
"""Thumbnails held at a time, 12 kB each: 400 MB. What has had to make room is read again when it is wanted again."""
_PAIRS_AT_ONCE = 1024
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

    def read(row: int) -> None:
        shard, offset, size = (int(column[row]) for column in places)
        found[row] = thumbnail_at(stage, shards[shard], offset, size)

    with ThreadPoolExecutor(_READERS, thread_name_prefix="pictures") as pool:
        for _ in pool.map(read, np.lexsort((places.offset, places.shard)).tolist()):
            pass
    return found


class Pictures:
    """Compares `S` pictures by their pixels, named by number; holds `HELD` thumbnails at most."""

    def __init__(self, stage: Folder, shards: Sequence[str], places: Places, most: float) -> None:
        """Read nothing yet; `shards` are the names of the stage's, `most` the difference that still is the same."""
        self._stage, self._shards, self._places, self._most = stage, shards, places, most
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
            found[at : at + together] = same_look.same(pixels[0], pixels[1], self._most)
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
