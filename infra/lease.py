"""A lock where the storage has none: an object that names its holder, who renews it while it works."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra.errors import RunError, UserError
from infra.logs import log
from infra.storage import Folder, storage_failures

LEASE_S = 60.0
"""A lease that its holder has not renewed for so many seconds is nobody's; holders renew theirs four times as often."""
SETTLE_S = 0.5
"""How long a new holder waits before it reads back whether the lease is its own: two that found it free at once have
written by then, and one of them is read."""


@contextmanager
def leased(folder: Folder, name: str) -> Iterator[None]:
    """Hold the object `name` of `folder` while the block runs; a killed holder's lease ends after `LEASE_S`.

    Only its holder deletes it. Who loses it all the same, frozen or cut off from the storage for longer than `LEASE_S`,
    is sent SIGTERM, since another may be at work.

    Raises:
        UserError: another process holds it; the message names that process and host.
        RunError: the lease was lost while the block ran.
    """
    lease = _Lease(folder, name)
    lease.take()
    renewer = threading.Thread(target=lease.keep, daemon=True)
    renewer.start()
    try:
        yield
    finally:
        lease.ended.set()
        renewer.join()
        lease.give_back()
    if lease.lost:
        raise RunError(lease.lost)


def busy(folder: Folder, owner: dict[str, Any], mend: str) -> UserError:
    """Return the error that names who holds a folder, and what to do."""
    who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
    return UserError(f"{folder.url}: {who} is already working on this folder; {mend}")


def owner() -> dict[str, Any]:
    """Return who we are: a host's name, and a number of the process there."""
    return {"host": socket.gethostname(), "pid": os.getpid()}


def parsed(data: bytes) -> dict[str, Any]:
    """Return what a lock's file says of its holder; nothing where it is none of ours."""
    try:
        found = json.loads(data.decode())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


class _Lease:
    def __init__(self, folder: Folder, name: str) -> None:
        self.folder, self.name = folder, name
        self.ended = threading.Event()
        self.lost = ""
        self._token = uuid.uuid4().hex
        self._renewed_at = 0.0

    def take(self) -> None:
        """Write our name where nobody's is. Raises UserError."""
        while not self._is_ours(self._holder()):
            self._wait_until_free()
            self._renew()
            time.sleep(SETTLE_S)

    def keep(self) -> None:
        """Renew the lease until `ended`."""
        while not self.ended.wait(LEASE_S / 4):
            try:
                holder = self._holder()
                # One that is gone may have been taken over and given back again.
                if self._is_ours(holder):
                    self._renew()
                    continue
                who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')} has taken"
            except storage_failures() as error:
                if time.monotonic() - self._renewed_at < LEASE_S:
                    log.warning("%s: cannot be renewed (%s); trying again", self.folder.path(self.name), error)
                    continue
                who = f"it could not be renewed for {LEASE_S:.0f} s, and others may take"
            self.lost = f"{self.folder.path(self.name)}: {who} this folder; run the same command to go on"
            log.error("%s", self.lost)
            os.kill(os.getpid(), signal.SIGTERM)
            return

    def give_back(self) -> None:
        """Delete the lease if it is ours still."""
        try:
            if self._is_ours(self._holder()):
                self.folder.delete(self.name)
        except storage_failures() as error:
            log.warning("%s: stays for %.0f s (%s)", self.folder.path(self.name), LEASE_S, error)

    def _wait_until_free(self) -> None:
        """Return once nobody holds it, at once where that is known. Raises UserError if somebody does."""
        holder = self._holder()
        renewed = holder.get("renewed")
        if not isinstance(renewed, int | float) or _is_gone(holder):
            return
        mend = f"wait for it to end (a killed one lets go after {LEASE_S:.0f} s)"
        if 0 <= time.time() - renewed < LEASE_S:
            raise busy(self.folder, holder, mend)
        # It has run out, or its clock and ours differ: a holder that lives renews it within that time.
        wait_s = LEASE_S / 2
        log.info("%s: watching for %.0f s whether it is renewed", self.folder.path(self.name), wait_s)
        time.sleep(wait_s)
        if self._holder().get("renewed", renewed) != renewed:
            raise busy(self.folder, holder, mend)

    def _holder(self) -> dict[str, Any]:
        try:
            return parsed(self.folder.read(self.name))
        except FileNotFoundError:
            return {}

    def _is_ours(self, holder: dict[str, Any]) -> bool:
        return holder.get("token") == self._token

    def _renew(self) -> None:
        at = time.monotonic()
        content = {**owner(), "machine": _machine(), "token": self._token, "renewed": time.time()}
        self.folder.write_json(self.name, content)
        self._renewed_at = at


def _machine() -> str:
    """Return where process numbers count: this boot of the kernel, and the namespace, a container's own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _is_gone(holder: dict[str, Any]) -> bool:
    here = _machine()
    return bool(here) and holder.get("machine") == here and not Path(f"/proc/{holder.get('pid')}").exists()
