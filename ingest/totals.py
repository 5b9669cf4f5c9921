"""What many shards come to together: their commits summed, every row once."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from infra.storage import Folder
from shards.layout import STATS_SUFFIX

READERS = 16
"""Commits read at a time; from an object store each takes a round trip."""
READ_AHEAD = 16 * READERS
HOSTS_KEPT = 10_000
"""Hosts whose failures are summed, the worst so far; each commit names its own worst ones."""


def read_commits(raw: Folder, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the commits of these shards, in their order; no more than `READ_AHEAD` of them are held."""
    with ThreadPoolExecutor(READERS, "commits") as readers:
        for at in range(0, len(names), READ_AHEAD):
            some = names[at : at + READ_AHEAD]
            yield from readers.map(lambda name: raw.read_json(f"{name}{STATS_SUFFIX}"), some)


class Sums:
    """Commits added up one by one; of each only the span it was in hand is kept.

    A row that was tried again in a later shard counts there and no longer in the first.
    """

    def __init__(self) -> None:
        self.shards = self.handled = 0
        self._bytes = 0
        self._statuses, self._reasons, self._hosts = Counter[str](), Counter[str](), Counter[str]()
        self._starts, self._ends = array("d"), array("d")

    def add(self, commit: dict[str, Any]) -> None:
        """Count one more shard in."""
        superseded = commit.get("supersedes", {})
        self._statuses.update(commit["by_status"])
        self._reasons.update(commit["by_reason"])
        self._statuses.subtract(superseded.get("by_status", {}))
        self._reasons.subtract(superseded.get("by_reason", {}))
        self.shards += 1
        self.handled += commit["count"]
        self._bytes += commit.get("bytes", 0)
        if commit.get("end_time") is not None:
            self._starts.append(commit["start_time"])
            self._ends.append(commit["end_time"])
        for host, failures in commit.get("by_host", {}).items():
            self._hosts[host] += sum(failures.values()) if isinstance(failures, dict) else failures
        if len(self._hosts) > 2 * HOSTS_KEPT:
            self._hosts = Counter(dict(self._hosts.most_common(HOSTS_KEPT)))

    def totals(self) -> dict[str, Any]:
        """Return `rows_in`, `by_status`, `by_reason`, `shards`, `bytes`, `seconds`, `images_per_s`.

        `seconds` is the time in which any shard was in hand.
        """
        seconds = busy_seconds(zip(self._starts, self._ends, strict=True))
        return {
            "rows_in": sum(self._statuses.values()),
            "by_status": {name: count for name, count in sorted(self._statuses.items()) if count},
            "by_reason": {name: count for name, count in sorted(self._reasons.items()) if count},
            "shards": self.shards,
            "bytes": self._bytes,
            "seconds": round(seconds, 3),
            "images_per_s": round(self._statuses["success"] / seconds, 2) if seconds else 0.0,
        }

    def worst_hosts(self, most: int) -> dict[str, int]:
        """Return the hosts with the most failures and their number; of very many hosts, about."""
        return dict(self._hosts.most_common(most))


def summed(commits: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return the sums over commits, as `Sums.totals`."""
    sums = Sums()
    for commit in commits:
        sums.add(commit)
    return sums.totals()


def busy_seconds(spans: Iterable[tuple[float, float]]) -> float:
    """Return how long at least one of the (start, end) spans lasted: pauses between runs do not count."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
