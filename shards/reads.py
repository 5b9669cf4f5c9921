"""Ranged reads of samples: retried while the storage stalls, through a disk cache if there is one."""

from __future__ import annotations

import contextlib
import functools
import importlib
import mmap
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from infra.errors import RunError
from infra.logs import log
from infra.storage import Folder
from shards.buffers import POOLED_FROM_BYTES, BufferPool
from shards.cache import DiskCache
from shards.index import Index, Shard
from shards.kept import KeepList
from shards.order import MOST_BLOCK_SAMPLES

PATIENCE_S = 120.0
"""How long a failing read is tried again by default: a store that is away for 30 s, and one try that hung
before, are to cost time and not the run."""
READ_TIMEOUT_S = 30.0
"""How long a read from an object store may take by default, and `1 / SLOWEST_BYTES_S` more for each byte."""
SLOWEST_BYTES_S = 2**20
"""What one read brings in a second at the least; a slower one is a stalled one, in bytes a second."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 4.0
LEAST_S = 1.0
"""What the last try gets of its time, however little patience is left, in seconds."""
LARGEST_GAP_BYTES = 2**18
"""What is read in vain between two kept samples rather than reading twice, in bytes."""
LOST_FOR_S = 600.0
"""How long a shard that stayed unreadable is given up before it is tried again, in seconds."""
TELLS_EVERY_S = 10.0
"""How often the log says that reads fail, in seconds."""
_LOST = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


class UnreadableShardError(RunError):
    """A shard that stays unreadable; the message names it and says how to go on."""


@dataclass(frozen=True)
class Piece:
    """The bytes of samples `[first, first + len(ends))` (numbers in the corpus), all of one shard.

    Sample `i` of them is `data[ends[i - 1] or 0 : ends[i]]`, empty where it is not kept. The memory of `data` is used
    again once the piece is gone; slices of it are bytes of their own.
    """

    shard: Shard
    url: str
    first: int
    ends: list[int]
    data: bytes | mmap.mmap
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

    def __init__(
        self,
        folder: Folder,
        index: Index,
        patience_s: float = PATIENCE_S,
        *,
        timeout_s: float = READ_TIMEOUT_S,
        cache: DiskCache | None = None,
        block_samples: int = MOST_BLOCK_SAMPLES,
        kept: KeepList | None = None,
        buffers: BufferPool | None = None,
    ) -> None:
        """Read `folder`, of `index`; of a run only what is `kept`, and short gaps between it.

        A read that fails is tried again for `patience_s` seconds after it first did; one from an object store
        fails when it takes `timeout_s`. With a `cache`, what is read and kept there is whole blocks of
        `block_samples` samples. Readers may share their `buffers`.
        """
        self.folder, self.index, self.patience_s, self.timeout_s = folder, index, patience_s, timeout_s
        self.cache, self.block_samples = cache, block_samples
        self._kept, self._gap = kept, max(1, int(LARGEST_GAP_BYTES * index.samples / max(1, index.tar_bytes)))
        self._has_warned, self._tells_again_at = False, 0.0
        self._closed = threading.Event()
        self._lost: dict[str, tuple[UnreadableShardError, float]] = {}
        self._measured: set[str] = set()
        self._buffers = buffers or BufferPool()

    def size(self, first: int, stop: int) -> int:
        """Return how many bytes the samples `[first, stop)` take in memory."""
        return sum(int(self._sizes(*piece).sum()) for piece in self._pieces(first, stop))

    def read(self, first: int, stop: int) -> list[Piece]:
        """Read the samples `[first, stop)`: one ranged read, one more for each shard's end they cross.

        A shard that stays unreadable gives a piece with its `fault` set, and is tried again after `LOST_FOR_S`.
        """
        pieces = []
        for number, row, last in self._pieces(first, stop):
            shard = self.index.shards[number]
            data: bytes | mmap.mmap = b""
            fault = self._given_up(shard)
            if fault is None:
                try:
                    data = self._rows(number, row, last)
                    if self._lost.pop(shard.name, None):
                        log.warning("%s: this shard can be read again", self.folder.path(shard.tar))
                except UnreadableShardError as error:
                    self._measured.discard(shard.name)
                    fault, _ = self._lost.setdefault(shard.name, (error, time.monotonic()))
                    if fault is error and not self._closed.is_set():
                        log.warning("%s", error)
            pieces.append(self._piece(number, row, last, data, fault))
        return pieces

    def _piece(
        self, number: int, row: int, last: int, data: bytes | mmap.mmap, fault: UnreadableShardError | None
    ) -> Piece:
        """Return the piece of rows `[row, last)` of a shard; `data` has them all, those too that are not kept."""
        shard, sizes, read = self.index.shards[number], self._sizes(number, row, last), data
        if fault is None and self._kept is not None:
            whole = np.diff(self._bounds(number, row, last))
            data = read if np.array_equal(whole, sizes) else _without_gaps(read, whole, sizes)
        url = self.folder.path(shard.tar)
        piece = Piece(shard, url, shard.first_sample + row, np.cumsum(sizes).tolist(), data, fault)
        if data is not read and isinstance(read, mmap.mmap):
            self._buffers.give_back(read)
        elif isinstance(data, mmap.mmap):
            self._buffers.lend(data, piece)
        return piece

    def _given_up(self, shard: Shard) -> UnreadableShardError | None:
        """Return why a shard is not to be read now; None where it is."""
        error, since = self._lost.get(shard.name, (None, 0.0))
        if error is None or time.monotonic() - since < LOST_FOR_S:
            return error
        self._lost[shard.name] = (error, time.monotonic())  # one tries, the others do without meanwhile
        return None

    def close(self) -> None:
        """Have reads under way on other threads fail instead of being tried again."""
        self._closed.set()

    def _pieces(self, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield (shard, first row, row after last) of what a run takes."""
        if self._kept is None or stop - first == 1:
            yield from self.index.pieces(first, stop)
            return
        numbers = self._kept.between(first, stop)
        for stretch in np.split(numbers, np.flatnonzero(np.diff(numbers) > self._gap) + 1):
            yield from self.index.pieces(int(stretch[0]), int(stretch[-1]) + 1)

    def _bounds(self, number: int, row: int, last: int) -> npt.NDArray[np.int64]:
        """Return where rows `[row, last)` of the `number`-th shard begin in its tar, and where the last one ends."""
        ends = self.index.ends(number, max(0, row - 1), last)
        return ends if row else np.concatenate([[0], ends])

    def _sizes(self, number: int, row: int, last: int) -> npt.NDArray[np.int64]:
        """Return how many bytes each of the rows `[row, last)` of a shard takes in a piece: none if not kept."""
        sizes = np.diff(self._bounds(number, row, last))
        if self._kept is not None:
            first = self.index.shards[number].first_sample + row
            is_kept = np.zeros(last - row, dtype=bool)
            is_kept[self._kept.between(first, first + last - row) - first] = True
            sizes = sizes * is_kept
        return sizes

    def _rows(self, number: int, row: int, last: int) -> bytes | mmap.mmap:
        """Return the bytes of rows `[row, last)` of a shard: from the blocks in the cache where there is one.

        In a buffer of the pool more may follow them.
        """
        shard, cache = self.index.shards[number], self.cache
        if cache is not None and shard.tar_sha256 is None:
            self._warn_of_no_digest(shard)
            cache = None
        if cache is None:
            bounds = self._bounds(number, row, last)
            return self._bytes(shard, int(bounds[0]), int(bounds[-1]))
        parts = []
        for low, high in _blocks(shard, row, last, self.block_samples):
            bounds = self._bounds(number, low, high)
            start, end = int(bounds[0]), int(bounds[-1])
            key = f"{shard.tar_sha256} {shard.tar_bytes} {start} {end}"
            data = cache.get(key, end - start)
            if data is None:
                data = bytes(self._bytes(shard, start, end, pooled=False))
                cache.put(key, data)
            parts.append(data[int(bounds[max(low, row) - low]) - start : int(bounds[min(high, last) - low]) - start])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _warn_of_no_digest(self, shard: Shard) -> None:
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "%s: without a digest in the index its samples are not cached, nor those of others like it; "
                "make an index with digests: `pairmill index %s --digests`",
                self.folder.path(shard.tar),
                self.folder.url,
            )

    def _bytes(self, shard: Shard, start: int, end: int, *, pooled: bool = True) -> bytes | mmap.mmap:
        """Read a range, trying again while that can help; a long one from a local disk to a buffer, if `pooled`.

        Raises:
            UnreadableShardError: the file is gone, forbidden or of another size than the index says, or it
                stayed unreadable for `patience_s`.
        """
        where, pause = self.folder.path(shard.tar), FIRST_PAUSE_S
        deadline: float | None = None
        limit_s = self.timeout_s + (end - start) / SLOWEST_BYTES_S
        while True:
            try:
                if shard.name not in self._measured:
                    # Before the first read: a shard is as indexed or lost as a whole, whoever reads which part first.
                    self._check_size(shard)
                    self._measured.add(shard.name)
                data, came = self._range(shard, start, end, limit_s, pooled)
                if came == end - start:
                    return data
                self._check_size(shard)
                problem: Exception = EOFError(f"{came} bytes came where {end - start} were asked for")
            except _LOST as error:
                raise UnreadableShardError(_unreadable(where, error)) from error
            except UnreadableShardError:
                raise
            except TimeoutError:
                problem = TimeoutError(f"not read within {limit_s:.0f} s")
            except Exception as error:
                if not is_transient(error):
                    raise
                problem = error
            now = time.monotonic()
            deadline = deadline or now + self.patience_s
            # Jitter alone is drawn here: ranks that were refused together should not come back together.
            if now + pause > deadline or self._closed.wait(pause * random.uniform(0.5, 1.0)):
                raise UnreadableShardError(_unreadable(where, problem)) from problem
            if now >= self._tells_again_at:
                self._tells_again_at = now + TELLS_EVERY_S
                log.warning("%s: a read failed (%s); trying again", where, _words(problem))
            limit_s = min(limit_s, max(LEAST_S, deadline - time.monotonic()))
            pause = min(pause * 2, LONGEST_PAUSE_S)

    def _range(self, shard: Shard, start: int, end: int, limit_s: float, pooled: bool) -> tuple[bytes | mmap.mmap, int]:
        """Read a range once; return it and how many bytes came."""
        size = end - start
        if not (pooled and self.folder.is_local and size >= POOLED_FROM_BYTES):
            data = self.folder.read_range(shard.tar, start, end, limit_s)
            return data, len(data)
        buffer = self._buffers.borrow(size)
        return buffer, self.folder.read_into(shard.tar, start, memoryview(buffer)[:size])

    def _check_size(self, shard: Shard) -> None:
        found = self.folder.size(shard.tar, self.timeout_s)
        if found != shard.tar_bytes:
            raise UnreadableShardError(
                f"{self.folder.path(shard.tar)}: this shard has {found} bytes where the index says "
                f"{shard.tar_bytes}; restore it, or if it is meant to be so `pairmill index {self.folder.url}`"
            )


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


def _blocks(shard: Shard, row: int, last: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield, cut at the shard's ends, the rows `[low, high)` of the blocks that rows `[row, last)` lie in."""
    offset = shard.first_sample
    for block in range((offset + row) // size, (offset + last - 1) // size + 1):
        yield max(0, block * size - offset), min(shard.samples, (block + 1) * size - offset)


def _without_gaps(data: bytes | mmap.mmap, read: npt.NDArray[np.int64], kept: npt.NDArray[np.int64]) -> bytes:
    """Return the bytes of the rows that are kept, of rows of `read` bytes of which `kept` are."""
    ends = np.cumsum(read)
    return b"".join(data[ends[row] - read[row] : ends[row]] for row in np.flatnonzero(kept).tolist())


def _unreadable(where: str, error: BaseException) -> str:
    return f"{where}: this shard cannot be read ({_words(error)}); restore it, or see `pairmill verify`"


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
