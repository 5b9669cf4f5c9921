"""A read-through cache of blocks on a local disk: bounded, shared by the processes of a node, held by no lock.

What is kept is a stream's whole block, one file each. Runs are cut at the ends of lanes and windows, elsewhere
in every epoch: kept as they are, a quarter of the second epoch's bytes would be read anew. Aligned pieces of a
tar are found again too, but much larger than blocks they have the first epoch read five times its bytes on a
node that takes its eighth of each epoch (`docs/architecture.md` has the figures).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import stat
import threading
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

from infra.logs import log

FOLDER = "pairmill-blocks-1"
"""The sub-folder of the user's that the files lie in; its number is that of their layout."""
CACHE_BYTES = 64 * 2**30
"""A cache's bound by default."""
SWEEP_AFTER_S = 3600.0
"""How old a temporary file is when its writer is taken for dead, in seconds."""
REST_S, FULL_S = 300.0, 30.0
"""How long nothing is written after a write failed, or after no room could be made, in seconds."""
RESERVE = 32
"""The last part in so many of the bound is left to what other processes write between this one's looks."""
PROCESSES = 64
"""How many processes may write and the bound still hold; with more it is overstepped in proportion."""

_MAGIC = b"PMBLOCK1"
_HEADER_BYTES = len(_MAGIC) + 8 + 4
_NAME = re.compile(r"[0-9a-f]{40}\.block")
_TEMPORARY = re.compile(r"[0-9a-f]{40}\.block-[0-9a-f]{8}\.part")
_FAN_OUT = re.compile(r"[0-9a-f]{2}")


@dataclass(frozen=True)
class _File:
    path: str
    bytes: int
    used_s: float


class DiskCache:
    """Blocks by key, as files that any number of processes put, find and evict at once.

    Nobody waits for another process: a file appears by a rename, a reader of one that goes keeps what it has
    opened, and two that fetch the same block write the same bytes. No file but those of its own naming, in a
    sub-folder of its own, is ever removed.

    The least recently used files go first (by modification time, set when a file is read). One that was used
    after `since_s` stays even when the cache is full, and a new block is then not kept: an epoch reads every
    block once, in an order of its own, and to evict by recency alone would leave a cache of half a corpus
    15% of hits where half are to be had.
    """

    def __init__(self, folder: str | os.PathLike[str], limit_bytes: int, since_s: float = float("inf")) -> None:
        """Keep up to `limit_bytes` in `folder`, which is made when first written to.

        The bound holds for `PROCESSES` writers, give or take a file each. `since_s` is when the run that this
        cache is of began, in seconds since 1970; by default every file may be evicted.
        """
        self.folder, self.limit_bytes, self.since_s = Path(folder) / FOLDER, limit_bytes, since_s
        self._lock = threading.Lock()
        self._room = 0  # bytes that may be written before the next look at the folder
        self._rests_until = 0.0
        self._has_warned = False

    def get(self, key: str, size: int) -> bytes | None:
        """Return the `size` bytes kept under `key`; None where there are none, or not these."""
        path = self._path(key)
        try:
            # What is no file, as a pipe that would wait for a writer, is not waited for.
            with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW), "rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise OSError(errno.EINVAL, f"{path.name} is no file")
                header, data = file.read(_HEADER_BYTES), file.read(size + 1)
                if len(data) != size or header != _header(key, data):
                    path.unlink(missing_ok=True)
                    return None
                with contextlib.suppress(OSError):  # a folder that may only be read serves all the same
                    os.utime(path)
                return data
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn("cannot be read", error.strerror)
            return None

    def put(self, key: str, data: bytes) -> None:
        """Keep `data` under `key`, in place of what may be there, if room can be made for it.

        A disk that is full or refuses costs a warning, and nothing is written for `REST_S`.
        """
        size = len(data) + _HEADER_BYTES
        if size > self.limit_bytes - self.limit_bytes // RESERVE:
            self._warn(f"of {self.limit_bytes} bytes is too small", f"one block has {size}")
            return
        if time.monotonic() < self._rests_until:
            return
        try:
            if self._has_room(size):
                self._write(self._path(key), key, data)
            else:
                self._rests_until = time.monotonic() + FULL_S
        except FileNotFoundError:
            return  # taken for a dead writer's, or the whole folder was removed: as if evicted
        except OSError as error:
            self._rests_until = time.monotonic() + REST_S
            self._warn("cannot be written to", error.strerror)

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()[:40]
        return self.folder / name[:2] / f"{name}.block"

    def _write(self, path: Path, key: str, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}-{secrets.token_hex(4)}.part")
        try:
            with temporary.open("xb") as file:
                # No fsync: what power loss leaves of it, the checksum finds out.
                file.write(_header(key, data))
                file.write(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _has_room(self, size: int) -> bool:
        """Tell whether `size` bytes may be written, making room for them where that is allowed.

        Looking at all files is dear, so it is done once in `limit_bytes / RESERVE / PROCESSES` written. What
        `PROCESSES` writers write between their looks fits in the reserve.
        """
        with self._lock:
            if size > self._room:
                reserve = self.limit_bytes // RESERVE
                most = self.limit_bytes - reserve - size
                if self._shrunk(most, most - reserve) > most:
                    return False
                self._room = size + reserve // PROCESSES
            self._room -= size
            return True

    def _shrunk(self, most: int, enough: int) -> int:
        """Return how many bytes are kept; beyond `most`, files not used of late go first, down to `enough`."""
        files = self._files()
        total = sum(file.bytes for file in files)
        if total <= most:
            return total
        for file in sorted(files, key=lambda file: file.used_s):
            if total <= enough or file.used_s >= self.since_s:
                break
            Path(file.path).unlink(missing_ok=True)
            total -= file.bytes
        return total

    def _files(self) -> list[_File]:
        """Return the files kept and those being written; what writers now dead left behind is removed."""
        found = []
        too_old = time.time() - SWEEP_AFTER_S
        for part in _entries(self.folder):
            if not _FAN_OUT.fullmatch(part.name):
                continue
            for entry in _entries(part.path):
                is_temporary = _TEMPORARY.fullmatch(entry.name)
                if not is_temporary and not _NAME.fullmatch(entry.name):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    about = entry.stat(follow_symlinks=False)
                    if is_temporary and about.st_mtime < too_old:
                        Path(entry.path).unlink()
                        continue
                    found.append(_File(entry.path, about.st_size, about.st_mtime))
        return found

    def _warn(self, what: str, why: object) -> None:
        if not self._has_warned:
            self._has_warned = True
            log.warning("%s: this cache %s (%s); going on without", self.folder, what, why)


def _entries(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _header(key: str, data: bytes) -> bytes:
    """Return what stands before a block: magic, length, and a checksum that a block of another key fails."""
    return _MAGIC + len(data).to_bytes(8, "little") + zlib.crc32(data, zlib.crc32(key.encode())).to_bytes(4, "little")
