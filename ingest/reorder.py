"""Results come as the web answers, shards are written in row order: what is early waits, in memory or on disk."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import IO, Any


class RowOrder:
    """Takes numbered rows with their pictures in any order and gives them back by number, 0 first.

    A slow host at row 0 may hold back all other rows of its shard; beyond `memory_bytes` their pictures wait
    in one file without a name, so memory stays flat and a killed process leaves nothing behind.
    """

    def __init__(self, memory_bytes: int, folder: str | None = None) -> None:
        self._memory_bytes, self._folder = memory_bytes, folder
        self._waiting: dict[int, tuple[dict[str, Any], bytes | tuple[int, int] | None]] = {}
        self._next = 0
        self._held = 0
        self._file: IO[bytes] | None = None

    def add(self, number: int, row: dict[str, Any], picture: bytes | None) -> None:
        """Take one row. Raises OSError when it has to wait on a disk that is full."""
        place: bytes | tuple[int, int] | None = picture
        if picture is not None and number != self._next:
            if self._held + len(picture) > self._memory_bytes:
                place = self._put_away(picture)
            else:
                self._held += len(picture)
        elif picture is not None:
            self._held += len(picture)
        self._waiting[number] = (row, place)

    def ready(self) -> Iterator[tuple[dict[str, Any], bytes | None]]:
        """Yield the rows whose turn it is, as far as they have come."""
        while self._next in self._waiting:
            row, place = self._waiting.pop(self._next)
            self._next += 1
            if isinstance(place, tuple):
                place = self._fetch_back(*place)
            elif place is not None:
                self._held -= len(place)
            yield row, place

    def close(self) -> None:
        """Give the disk space back."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # of bytes that a full disk did not take, and nobody waits for
                self._file.close()

    def _put_away(self, picture: bytes) -> tuple[int, int]:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 (held until close)
        start = self._file.seek(0, 2)
        self._file.write(picture)
        return start, len(picture)

    def _fetch_back(self, start: int, size: int) -> bytes:
        assert self._file is not None
        self._file.seek(start)
        return self._file.read(size)
