"""Ranged reads of samples: retried while the storage stalls, read ahead within a bound of bytes."""

from __future__ import annotations

import contextlib
import functools
import importlib
import random
import threading
import time
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from infra.errors import RunError
from infra.logs import log
from infra.storage import Folder
from shards.index import Index, Shard
from shards.order import Step

PATIENCE_S = 30.0
"""How long a failing read is tried again by default."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 4.0
_LOST = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


class UnreadableShardError(RunError):
    """A shard that stays unreadable; the message names it and says how to go on."""


@dataclass(frozen=True)
class Piece:
    """The bytes of samples `[first, first + len(ends))` (numbers in the corpus), all of one shard.

    Sample `i` of them is `data[ends[i - 1] or 0 : ends[i]]`. `data` ends early where the file does.
    """

    shard: Shard
    url: str
    first: int
    ends: list[int]
    data: bytes
    fault: UnreadableShardError | None = None

    def place(self, number: int) -> tuple[int, int]:
        """Return where in `data` the sample lies that has this number in the corpus: its first byte, its end."""
        row = number - self.first
        return self.ends[row - 1] if row else 0, self.ends[row]

    def sample(self, number: int) -> bytes:
        """Return the bytes of one sample by its number in the corpus."""
        start, end = self.place(number)
        return self.data[start:end]


class Reader:
    """Reads runs of samples from a folder."""

    def __init__(self, folder: Folder, index: Index, patience_s: float) -> None:
        """Read `folder`, of `index`; a read that fails is tried again for `patience_s` seconds."""
        self.folder, self.index, self.patience_s = folder, index, patience_s
        self._lost: dict[str, UnreadableShardError] = {}
        self._measured: set[str] = set()
        self._index_lock = threading.Lock()

    def size(self, first: int, stop: int) -> int:
        """Return how many bytes the samples `[first, stop)` take."""
        total = 0
        for number, row, last in self.index.pieces(first, stop):
            with self._index_lock:
                ends = self.index.ends(number, max(0, row - 1), last)
            total += int(ends[-1]) - (int(ends[0]) if row else 0)
        return total

    def read(self, first: int, stop: int) -> list[Piece]:
        """Read the samples `[first, stop)`: one ranged read, one more for each shard's end they cross.

        A shard that stays unreadable gives a piece with its `fault` set.
        """
        pieces, at = [], first
        for shard, start, end, ends in self._ranges(first, stop):
            fault = self._lost.get(shard.name)
            data = b""
            if fault is None:
                try:
                    data = self._bytes(shard, start, end)
                except UnreadableShardError as error:
                    fault = self._lost[shard.name] = error
            url = self.folder.path(shard.tar)
            pieces.append(Piece(shard, url, at, (ends - start).tolist(), data, fault))
            at += len(ends)
        return pieces

    def _ranges(self, first: int, stop: int) -> list[tuple[Shard, int, int, npt.NDArray[np.int64]]]:
        ranges = []
        for number, row, last in self.index.pieces(first, stop):
            with self._index_lock:
                ends = self.index.ends(number, max(0, row - 1), last)
            start, ends = (int(ends[0]), ends[1:]) if row else (0, ends)
            ranges.append((self.index.shards[number], start, int(ends[-1]), ends))
        return ranges

    def _bytes(self, shard: Shard, start: int, end: int) -> bytes:
        """Read a range, trying again while that can help.

        Raises:
            UnreadableShardError: the file is gone, forbidden or of another size than the index says, or it
            stayed
                unreadable for `patience_s`.
        """
        where, pause = self.folder.path(shard.tar), FIRST_PAUSE_S
        deadline = time.monotonic() + self.patience_s
        while True:
            try:
                if shard.name not in self._measured:
                    # Before the first read: a shard is as indexed or lost as a whole, whoever reads which part first.
                    self._check_size(shard)
                    self._measured.add(shard.name)
                data = self.folder.read_range(shard.tar, start, end)
                if len(data) == end - start:
                    return data
                self._check_size(shard)
                problem: Exception = EOFError(f"{len(data)} bytes came where {end - start} were asked for")
            except _LOST as error:
                raise UnreadableShardError(_unreadable(where, error)) from error
            except UnreadableShardError:
                raise
            except Exception as error:
                if not is_transient(error):
                    raise
                problem = error
            if time.monotonic() + pause > deadline:
                raise UnreadableShardError(_unreadable(where, problem)) from problem
            log.warning("%s: a read failed (%s); trying again", where, _words(problem))
            # Jitter alone is drawn here: ranks that were refused together should not come back together.
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, LONGEST_PAUSE_S)

    def _check_size(self, shard: Shard) -> None:
        found = self.folder.size(shard.tar)
        if found != shard.tar_bytes:
            raise UnreadableShardError(
                f"{self.folder.path(shard.tar)}: this shard has {found} bytes where the index says "
                f"{shard.tar_bytes}; restore it, or if it is meant to be so `pairmill index {self.folder.url}`"
            )


Run = tuple[int, int]
"""Epoch, and number of the run in it."""


class _Coming(NamedTuple):
    """A run that is being read: place `place` of what the future brings."""

    future: Future[list[list[Piece]]]
    place: int


class ReadAhead:
    """Holds the runs that coming steps need, and reads them in the background in the order of first need.

    From a local disk the runs of one step are read one after another, by one thread: handing each to a thread of its
    own would cost more than to read it. Elsewhere all are under way at once, as far as there are threads.
    """

    def __init__(self, reader: Reader, threads: int) -> None:
        self.reader = reader
        self.ahead_bytes = 0
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="shard-read")
        self._runs: dict[Run, list[Piece] | _Coming] = {}
        self._brings: dict[tuple[int, int], int] = {}
        self._ends: defaultdict[tuple[int, int], list[Run]] = defaultdict(list)

    def request(self, step: Step) -> None:
        """Start reading what `step` needs and no earlier step did."""
        epoch, first, stop, until = step.epoch, step.first, step.stop, step.until
        new, bounds, size = [], [], 0
        for run, place in dict(zip(step.run.tolist(), range(len(step.run)), strict=True)).items():
            name = (epoch, run)
            if name in self._runs:
                continue
            self._runs[name] = []
            new.append(name)
            bounds.append((int(first[place]), int(stop[place])))
            size += self.reader.size(*bounds[-1])
            self._ends[epoch, int(until[place])].append(name)
        each = max(1, len(bounds)) if self.reader.folder.is_local else 1
        for start in range(0, len(bounds), each):
            future = self._pool.submit(self._read, bounds[start : start + each])
            for place, name in enumerate(new[start : start + each]):
                self._runs[name] = _Coming(future, place)
        self._brings[epoch, step.step] = size
        self.ahead_bytes += size

    def take(self, step: Step) -> list[Piece]:
        """Return the piece that holds each of the step's samples, waiting for those on their way, `[B]`.

        The memory of runs that no later step needs is let go.
        """
        self.ahead_bytes -= self._brings.pop((step.epoch, step.step))
        taken = []
        for run, sample in zip(step.run.tolist(), step.sample.tolist(), strict=True):
            pieces = self._runs[step.epoch, run]
            if isinstance(pieces, _Coming):
                pieces = self._runs[step.epoch, run] = pieces.future.result()[pieces.place]
            piece = pieces[-1]
            taken.append(piece if piece.first <= sample else next(p for p in reversed(pieces) if p.first <= sample))
        for name in self._ends.pop((step.epoch, step.step), ()):
            del self._runs[name]
        return taken

    def _read(self, bounds: list[tuple[int, int]]) -> list[list[Piece]]:
        return [self.reader.read(first, stop) for first, stop in bounds]

    def close(self) -> None:
        """Drop what is not begun and wait for no one."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def is_transient(error: BaseException) -> bool:
    """Tell whether a failed read may succeed when tried again: the network's and the store's own troubles."""
    if isinstance(error, OSError | EOFError | TimeoutError):
        return not isinstance(error, _LOST)
    return isinstance(error, _client_errors())


@functools.cache
def _client_errors() -> tuple[type[BaseException], ...]:
    """Exceptions of the object-store clients that are installed and are no OSError."""
    found: list[Any] = []
    with contextlib.suppress(ImportError):
        found.append(importlib.import_module("aiohttp").ClientError)
    with contextlib.suppress(ImportError):
        exceptions = importlib.import_module("botocore.exceptions")
        found += [exceptions.BotoCoreError, exceptions.ClientError]
    return tuple(found)


def _unreadable(where: str, error: BaseException) -> str:
    return f"{where}: this shard cannot be read ({_words(error)}); restore it, or see `pairmill verify`"


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
