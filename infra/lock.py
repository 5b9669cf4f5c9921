"""One process at a time on a corpus or a run; the second one says so and leaves."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from infra.errors import RunError, UserError
from infra.storage import Folder, full_disk_is_named

LOCK_NAME = ".lock"
NO_FILE_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""What `flock` says on a file system that has no locks: some mounts of NFS, Lustre and FUSE."""
LEASE_S = 60.0
"""An object-store lock whose holder has not renewed it for this many seconds belongs to nobody."""


@contextmanager
def exclusive(folder: Folder) -> Iterator[None]:
    """Hold `folder` for this process while the block runs.

    Locally the operating system's file lock, which a killed process gives back at once. On an object store a
    lease in an object, renewed while the block runs; a killed holder's lease ends after `LEASE_S`. So too on a
    local file system that has no locks.

    Raises:
        UserError: another process holds it; the message names that process and host.
    """
    if folder.is_local:
        with _opened(Path(folder.path(LOCK_NAME))) as stream:
            if _is_locked(folder, stream):
                with _signed(folder, stream):
                    yield
                return
    with _lease(folder):
        yield


def _owner() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}


def _busy(folder: Folder, owner: dict[str, Any], mend: str) -> UserError:
    who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
    return UserError(f"{folder.url}: {who} is already working on this folder; {mend}")


def _is_locked(folder: Folder, stream: IO[bytes]) -> bool:
    """Take the file's lock; False where the file system has none."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.seek(0)
        raise _busy(folder, _parsed(stream.read().decode()), "wait for it to end, or stop it") from None
    except OSError as error:
        if error.errno in NO_FILE_LOCKS:
            return False
        raise RunError(f"{folder.path(LOCK_NAME)}: cannot be locked ({error.strerror})") from None
    return True


@contextmanager
def _signed(folder: Folder, stream: IO[bytes]) -> Iterator[None]:
    """Have the lock's file say who holds it while the block runs."""
    with full_disk_is_named(folder.path(LOCK_NAME)):
        _rewrite(stream, json.dumps(_owner()))
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
    except PermissionError as error:
        raise UserError(f"{path.parent}: may not be written to ({error.strerror}); name another folder") from None


def _rewrite(stream: IO[bytes], text: str) -> None:
    stream.truncate(0)
    stream.write(text.encode())


def _parsed(text: str) -> dict[str, Any]:
    try:
        owner = json.loads(text)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


@contextmanager
def _lease(folder: Folder) -> Iterator[None]:
    holder = _parsed(folder.read(LOCK_NAME).decode()) if folder.exists(LOCK_NAME) else {}
    if holder and time.time() - holder.get("renewed", 0) < LEASE_S and not _is_gone(holder):
        raise _busy(folder, holder, f"wait for it to end (a killed one lets go after {LEASE_S:.0f} s)")
    stop = threading.Event()
    _renew(folder)
    renewer = threading.Thread(target=_keep_renewing, args=(folder, stop), daemon=True)
    renewer.start()
    try:
        yield
    finally:
        stop.set()
        renewer.join()
        folder.delete(LOCK_NAME)


def _is_gone(holder: dict[str, Any]) -> bool:
    return holder.get("host") == socket.gethostname() and not Path(f"/proc/{holder.get('pid')}").exists()


def _renew(folder: Folder) -> None:
    folder.write_json(LOCK_NAME, {**_owner(), "renewed": time.time()})


def _keep_renewing(folder: Folder, stop: threading.Event) -> None:
    while not stop.wait(LEASE_S / 4):
        _renew(folder)
