"""Names to addresses, remembered for a while; addresses that are nobody's public host are refused."""

from __future__ import annotations

import asyncio
import socket
from collections import OrderedDict
from dataclasses import dataclass

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import AsyncResolver

from infra import metrics
from ingest.config import FetchConfig

MAX_NAMES = 100_000
_NOT_THERE = ("not found", "no data", "nxdomain", "misformatted", "bad name")


class BlockedAddressError(Exception):
    """The host's address is private, loopback, link-local, metadata or otherwise not public."""


class UnresolvedError(Exception):
    """The name has no address; `transient` when a later lookup may find one."""

    def __init__(self, host: str, cause: str, *, transient: bool) -> None:
        super().__init__(f"{host}: {cause}")
        self.transient = transient


@dataclass
class _Entry:
    until: float
    found: list[ResolveResult] | None
    error: UnresolvedError | BlockedAddressError | None


class Resolver(AbstractResolver):
    """A cache of lookups, failed ones too, with a bound on those in flight; one lookup a name at a time."""

    def __init__(self, config: FetchConfig) -> None:
        self._config = config
        self._inner = AsyncResolver()
        self._slots = asyncio.Semaphore(config.dns_in_flight)
        self._known: OrderedDict[tuple[str, int], _Entry] = OrderedDict()
        self._asked: dict[tuple[str, int], asyncio.Task[_Entry]] = {}

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Return the addresses of `host` that may be asked.

        Raises:
            UnresolvedError: it has none.
            BlockedAddressError: it has some, and none of them may be asked.
        """
        key = (host, int(family))
        entry = self._known.get(key)
        if entry is None or entry.until <= asyncio.get_running_loop().time():
            task = self._asked.get(key)
            if task is None:
                task = asyncio.create_task(self._lookup(host, family))
                self._asked[key] = task
                task.add_done_callback(lambda _: self._asked.pop(key, None))
            entry = await asyncio.shield(task)
            self._remember(key, entry)
        if entry.error is not None:
            raise entry.error
        return [{**one, "port": port} for one in entry.found or ()]

    async def close(self) -> None:
        """Stop the lookups in flight."""
        for task in list(self._asked.values()):
            task.cancel()
        await self._inner.close()

    def _remember(self, key: tuple[str, int], entry: _Entry) -> None:
        self._known[key] = entry
        self._known.move_to_end(key)
        if len(self._known) > MAX_NAMES:
            self._known.popitem(last=False)

    async def _lookup(self, host: str, family: socket.AddressFamily) -> _Entry:
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            async with self._slots, asyncio.timeout(self._config.connect_s):
                found = await self._inner.resolve(host, 0, family)
        except TimeoutError:
            error = UnresolvedError(host, "no answer to the name lookup", transient=True)
            return _Entry(loop.time() + self._config.dns_keep_failure_s, None, error)
        except (OSError, UnicodeError, ValueError) as failure:
            text = str(failure)
            gone = any(sign in text.lower() for sign in _NOT_THERE)
            error = UnresolvedError(host, text, transient=not gone)
            return _Entry(loop.time() + self._config.dns_keep_failure_s, None, error)
        finally:
            metrics.step_seconds().observe(loop.time() - started, tags={"step": "resolve"})
        until = loop.time() + self._config.dns_keep_s
        allowed = [one for one in found if self._config.may_ask(one["host"])]
        if not allowed:
            return _Entry(until, None, BlockedAddressError(f"{host} is {found[0]['host']}, not a public address"))
        return _Entry(until, allowed, None)
