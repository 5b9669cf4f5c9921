"""What was asked of the server, so that a test can say how often and how hard a client knocked."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Ledger:
    """Counts requests by path, kind and host, and the most requests in flight at once on each host."""

    def __init__(self) -> None:
        self.paths: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.hosts: Counter[str] = Counter()
        self.user_agents: Counter[str] = Counter()
        self.too_soon = 0
        self._in_flight: defaultdict[str, int] = defaultdict(int)
        self._peak: defaultdict[str, int] = defaultdict(int)

    @contextmanager
    def request(self, host: str, path: str, kind: str, user_agent: str) -> Iterator[None]:
        """Counts one request, in flight for as long as the context lasts."""
        self.paths[path] += 1
        self.kinds[kind] += 1
        self.hosts[host] += 1
        self.user_agents[user_agent] += 1
        self._in_flight[host] += 1
        self._peak[host] = max(self._peak[host], self._in_flight[host])
        try:
            yield
        finally:
            self._in_flight[host] -= 1

    def clear(self) -> None:
        """Forgets the counts; requests in flight stay in flight."""
        for counts in (self.paths, self.kinds, self.hosts, self.user_agents):
            counts.clear()
        self.too_soon = 0
        self._peak.clear()

    def as_json(self) -> dict[str, Any]:
        """The counts as plain values; `too_soon` counts requests that came before Retry-After was over."""
        hosts = {host: {"requests": count, "peak_concurrent": self._peak[host]} for host, count in self.hosts.items()}
        return {
            "requests": sum(self.hosts.values()),
            "paths": dict(self.paths),
            "kinds": dict(self.kinds),
            "user_agents": dict(self.user_agents),
            "too_soon": self.too_soon,
            "hosts": hosts,
        }
