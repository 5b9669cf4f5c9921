"""Folders on any fsspec filesystem, with files that appear whole or not at all."""

from __future__ import annotations

import errno
import functools
import io
import json
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, TypeVar, cast

import fsspec
from fsspec.asyn import sync
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from infra.errors import NoSpaceError, RunError, UserError
from infra.logs import log

TEMPORARY_PREFIX = ".tmp-"
"""Start of the name of every file that is still being written on a local disk."""
HELD_BYTES = 8 * 2**20
"""What is held in memory of a file on its way to an object store; more waits in a file without a name."""
UPLOAD_BYTES = 2**20
OUTAGE_S = 300.0
"""How long an object store may be away while something is to be written, in seconds."""
_REFUSALS = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
"""What no waiting mends."""


ResultT = TypeVar("ResultT")


class Folder:
    """One folder on an fsspec filesystem (`file`, `s3`, `gs`, `hf`, `memory`).

    Every name passed in is relative to the folder and cannot climb out of it. Picklable: only the URL
    travels, so a Ray worker opens its own connections.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        """Open the folder at `url`; nothing is created. Raises UserError for an unknown protocol."""
        self.url = os.fspath(url).rstrip("/") or "/"
        try:
            self.fs, self._root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except TypeError:
            self.fs, self._root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise UserError(f"{self.url}: this storage cannot be opened: {error}") from None
        self.is_local = isinstance(self.fs, LocalFileSystem)
        if self.is_local:
            self.url = self._root = str(Path(self._root).absolute())

    def __truediv__(self, name: str) -> Folder:
        return Folder(self._address(self.url, name))

    def __reduce__(self) -> tuple[Any, ...]:
        return (Folder, (self.url,))

    def __repr__(self) -> str:
        return f"Folder({self.url!r})"

    def path(self, name: str) -> str:
        """Return the full path of `name`, for messages and for readers that open files themselves."""
        return self._address(self.url, name)

    def exists(self, name: str = "") -> bool:
        """Tell whether the file or folder `name` (the folder itself by default) is there.

        The one question that does not wait for a store that is away: a command asks it first, and says so at once.
        """
        return bool(self.fs.exists(self._inside(name)))

    def size(self, name: str, timeout_s: float | None = None) -> int:
        """Return the size of a file in bytes, within `timeout_s` as `read_range`.

        Raises:
            FileNotFoundError, TimeoutError.
        """
        path = self._inside(name)
        if timeout_s is None or not self.fs.async_impl:
            return int(self.fs.size(path))
        return int(sync(self.fs.loop, self.fs._size, path, timeout=timeout_s))

    def names(self, suffix: str = "", timeout_s: float | None = None) -> list[str]:
        """Return the sorted names of the files in the folder that end in `suffix`; [] without a folder.

        An object store may be away for `OUTAGE_S`; with `timeout_s` it is asked once, and that long.
        """
        return sorted(
            name
            for name, is_folder in self._entries(timeout_s)
            if name.endswith(suffix) and not is_folder and not name.startswith(TEMPORARY_PREFIX)
        )

    def folders(self) -> list[str]:
        """Return the sorted names of the folders directly in this one; an object store may be away for `OUTAGE_S`."""
        return sorted(name for name, is_folder in self._entries() if is_folder)

    def is_empty(self) -> bool:
        """Tell whether nothing at all lies in the folder (or it does not exist)."""
        return not self.names() and not self.folders()

    def read(self, name: str) -> bytes:
        """Return the whole content of a file; an object store may be away for `OUTAGE_S`. Raises FileNotFoundError."""
        if self.is_local:
            return bytes(self.fs.cat_file(self._inside(name)))
        return patiently(f"{self.url}: cannot be read", lambda: bytes(self.fs.cat_file(self._inside(name))))

    def read_range(self, name: str, start: int, end: int, timeout_s: float | None = None) -> bytes:
        """Return bytes `[start, end)` of a file in one ranged read.

        On an object store (any asynchronous filesystem) it may take `timeout_s` seconds, all tries of the
        store's client included; without, the client alone decides.

        Raises:
            FileNotFoundError, TimeoutError.
        """
        path = self._inside(name)
        if self.is_local:
            with Path(path).open("rb", buffering=0) as file:
                parts, at = [], start
                while at < end and (part := os.pread(file.fileno(), end - at, at)):  # one brings 2 GiB at the most
                    parts.append(part)
                    at += len(part)
                return b"".join(parts)
        if timeout_s is None or not self.fs.async_impl:
            return bytes(self.fs.cat_file(path, start=start, end=end))
        # The clients' own limits are for a silent socket, and are multiplied by their nested retries.
        return bytes(sync(self.fs.loop, self.fs._cat_file, path, start=start, end=end, timeout=timeout_s))

    def read_into(self, name: str, start: int, buffer: memoryview) -> int:
        """Fill `buffer` from byte `start` of a file on a local disk; return how many bytes there were.

        Raises:
            FileNotFoundError.
        """
        with Path(self._inside(name)).open("rb", buffering=0) as file:
            came = 0
            while more := os.preadv(file.fileno(), [buffer[came:]], start + came):  # 2 GiB at the most
                came += more
            return came

    def read_json(self, name: str) -> Any:
        """Return a JSON file's value. Raises FileNotFoundError, and RunError if it is not JSON."""
        try:
            return json.loads(self.read(name))
        except ValueError as error:
            raise RunError(f"{self.path(name)}: not valid JSON ({error}); the file is damaged") from None

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading (seekable)."""
        stream: IO[bytes] = self.fs.open(self._inside(name), "rb")
        return stream

    def write(self, name: str, data: bytes) -> None:
        """Write a file atomically: readers see the old content or the new, never a part."""
        with self.create(name) as stream:
            stream.write(data)

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file atomically, keys in the given order, two-space indent."""
        self.write(name, (json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n").encode())

    @contextmanager
    def create(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file for writing that appears under `name` only when the block ends without an error.

        Locally: a temporary name, fsync, rename. On an object store: kept aside (on disk beyond `HELD_BYTES`)
        until the block ends, then one put or a completed multipart upload, tried again while the store is away
        for no longer than `OUTAGE_S`.

        Raises:
            NoSpaceError: the disk or the quota is full, or the file larger than one may be.
        """
        target = self._inside(name)
        with full_disk_is_named(self.path(name)):
            if self.is_local:
                with self._create_local(target) as stream:
                    yield stream
            else:
                with self._create_remote(target) as stream:
                    yield stream

    def delete(self, name: str) -> None:
        """Remove a file; one that is not there is no error."""
        try:
            self.fs.rm_file(self._inside(name))
        except FileNotFoundError:
            return

    def delete_tree(self) -> None:
        """Remove the folder and everything below it; one that is not there is no error."""
        try:
            if self.is_local:
                self.fs.rm(self._root, recursive=True)
                return
            # One by one: some S3 servers refuse the bulk request that today's client sends.
            for path in self.fs.find(self._root):
                self.fs.rm_file(path)
        except FileNotFoundError:
            return

    def sweep_temporary(self) -> int:
        """Remove what interrupted writers left behind in this folder; return how many files went."""
        if not self.is_local or not Path(self._root).is_dir():
            return 0
        left = [path for path in Path(self._root).iterdir() if path.name.startswith(TEMPORARY_PREFIX)]
        for path in left:
            path.unlink(missing_ok=True)
        return len(left)

    @contextmanager
    def _create_local(self, target: str) -> Iterator[IO[bytes]]:
        path = Path(target)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{secrets.token_hex(4)}")
        try:
            with temporary.open("wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def _create_remote(self, target: str) -> Iterator[IO[bytes]]:
        if isinstance(self.fs, MemoryFileSystem):  # its files appear when opened
            held = io.BytesIO()
            yield held
            self.fs.pipe_file(target, held.getvalue())
            return
        with tempfile.SpooledTemporaryFile(HELD_BYTES) as aside:  # no name: a killed process leaves nothing
            content = cast("IO[bytes]", aside)
            yield content
            patiently(f"{self.url}: cannot be written to", lambda: self._upload(target, content))

    def _upload(self, target: str, content: IO[bytes]) -> None:
        content.seek(0)
        stream = self.fs.open(target, "wb")
        try:
            shutil.copyfileobj(content, stream, UPLOAD_BYTES)
        except BaseException:
            stream.discard()
            stream.closed = True  # closing would upload the torn part
            raise
        stream.close()

    def _entries(self, timeout_s: float | None = None) -> Iterator[tuple[str, bool]]:
        """Yield the name of each file and folder here, and whether it is a folder.

        A local disk is asked without fsspec, which looks at every file by itself and keeps 1 kB of each.
        """
        try:
            if self.is_local:
                with os.scandir(self._root) as found:
                    yield from ((one.name, kind == "folder") for one in found if (kind := _kind(one)))
                return
            if timeout_s is not None and self.fs.async_impl:
                listing = sync(self.fs.loop, self.fs._ls, self._root, detail=True, timeout=timeout_s)
            else:
                listing = patiently(f"{self.url}: cannot be listed", lambda: self.fs.ls(self._root, detail=True))
        except FileNotFoundError:
            return
        except NotADirectoryError:
            if self.is_local and Path(self._root).is_file():  # named by mistake: it holds something, itself
                yield Path(self._root).name, False
            return
        for entry in listing:
            if entry["type"] in ("file", "directory"):
                yield PurePosixPath(entry["name"].rstrip("/")).name, entry["type"] == "directory"

    def _inside(self, name: str) -> str:
        return self._address(self._root, name)

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def _address(root: str, name: str) -> str:
        if not name:
            return root
        parts = PurePosixPath(name).parts
        if PurePosixPath(name).is_absolute() or ".." in parts or "\x00" in name or "\\" in name:
            raise UserError(f"{name!r}: a file name may not leave its folder")
        return f"{root.rstrip('/')}/{'/'.join(parts)}"


def storage_failures() -> tuple[type[Exception], ...]:
    """Return what a storage raises when it cannot be reached or does not let us in; for an `except` clause."""
    # botocore's errors are no OSError; where it has not been imported none of them is under way.
    botocore = sys.modules.get("botocore.exceptions")
    return (OSError,) if botocore is None else (OSError, botocore.BotoCoreError, botocore.ClientError)


def patiently(trouble: str, act: Callable[[], ResultT]) -> ResultT:
    """Do something with a storage, again and again while it fails as one does that is away for a while."""
    until, pause = time.monotonic() + OUTAGE_S, 0.5
    while True:
        try:
            return act()
        except _REFUSALS:
            raise
        except storage_failures() as error:
            if time.monotonic() + pause > until or getattr(error, "errno", None) in _NO_SPACE:
                raise
            what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            log.warning("%s: %s; trying again for %d s", trouble, what, until - time.monotonic())
            time.sleep(pause)
            pause = min(2 * pause, 10.0)


@contextmanager
def full_disk_is_named(path: str) -> Iterator[None]:
    """Turn the operating system's 'no space left' and its kin into a NoSpaceError that names `path`."""
    try:
        yield
    except OSError as error:
        what = _NO_SPACE.get(error.errno or 0)
        if what is None:
            raise
        again = "and run the same command again, what is finished will not be done twice"
        raise NoSpaceError(f"{path}: {what} {again}") from error


_NO_SPACE = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "your quota on this disk is used up; free some space",
    errno.EFBIG: "no file may grow this large here (see `ulimit -f`); raise that bound",
}


def _kind(entry: os.DirEntry[str]) -> Literal["folder", "file", ""]:
    """Tell what an entry of a local folder is; a loop of links counts as a file, for its reader to name."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else ""
    except OSError:
        return "file"
