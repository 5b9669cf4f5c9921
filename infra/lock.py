"""One process at a time on a corpus or a run; the second one says so and leaves."""

from __future__ import annotations

import errno
import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from infra.errors import RunError, UserError
from infra.lease import busy, leased, owner, parsed
from infra.storage import Folder, full_disk_is_named

LOCK_NAME = ".lock"
NO_FILE_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""What `flock` says on a file system that has no locks: some mounts of NFS, Lustre and FUSE."""


@contextmanager
def exclusive(folder: Folder) -> Iterator[None]:
    """Hold `folder` for this process while the block runs.

    Locally the operating system's file lock, which a killed process gives back at once. On an object store a
    lease (`infra.lease`), which a killed holder keeps for a minute. So too on a local file system that has no locks.

    Raises:
        UserError: another process holds it; the message names that process and host.
    """
    if folder.is_local:
        with _opened(Path(folder.path(LOCK_NAME))) as stream:
            if _is_locked(folder, stream):
                with _signed(folder, stream):
                    yield
                return
    with leased(folder, LOCK_NAME):
        yield


def _is_locked(folder: Folder, stream: IO[bytes]) -> bool:
    """Take the file's lock; False where the file system has none."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.seek(0)
        raise busy(folder, parsed(stream.read()), "wait for it to end, or stop it") from None
    except OSError as error:
        if error.errno in NO_FILE_LOCKS:
            return False
        raise RunError(f"{folder.path(LOCK_NAME)}: cannot be locked ({error.strerror})") from None
    return True


@contextmanager
def _signed(folder: Folder, stream: IO[bytes]) -> Iterator[None]:
    """Have the lock's file say who holds it while the block runs."""
    with full_disk_is_named(folder.path(LOCK_NAME)):
        _rewrite(stream, json.dumps(owner()))
    try:
        yield
    finally:
        _rewrite(stream, "")


def _opened(path: Path) -> IO[bytes]:
    """Open the lock's file, unbuffered, so that a full disk is told at once and not when it is closed."""
    try:
        with full_disk_is_named(str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("ab+", buffering=0)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{path.parent}: is, or lies below, a file and no folder; name another folder") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, where a lock's file belongs; remove it") from None
    except PermissionError as error:
        raise UserError(f"{path.parent}: may not be written to ({error.strerror}); name another folder") from None


def _rewrite(stream: IO[bytes], text: str) -> None:
    stream.truncate(0)
    stream.write(text.encode())
