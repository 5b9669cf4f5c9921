"""What many shards come to together: their commits summed, every row once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from infra.storage import Folder
from shards.layout import STATS_SUFFIX

READERS = 16
"""Commits read at a time; from an object store each takes a round trip."""


def read_commits(raw: Folder, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the commits of these shards, in their order."""
    with ThreadPoolExecutor(READERS, "commits") as readers:
        return list(readers.map(lambda name: raw.read_json(f"{name}{STATS_SUFFIX}"), names))


def summed(commits: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the sums over commits: `rows_in`, `by_status`, `by_reason`, `shards`, `bytes`, `seconds`, `images_per_s`.

    A row that was tried again in a later shard counts there and no longer in the first. `seconds` is the time in
    which any shard was in hand.
    """
    statuses, reasons = Counter[str](), Counter[str]()
    for commit in commits:
        statuses.update(commit["by_status"])
        reasons.update(commit["by_reason"])
        superseded = commit.get("supersedes", {})
        statuses.subtract(superseded.get("by_status", {}))
        reasons.subtract(superseded.get("by_reason", {}))
    seconds = busy_seconds(
        (commit["start_time"], commit["end_time"]) for commit in commits if commit.get("end_time") is not None
    )
    return {
        "rows_in": sum(statuses.values()),
        "by_status": {name: count for name, count in sorted(statuses.items()) if count},
        "by_reason": {name: count for name, count in sorted(reasons.items()) if count},
        "shards": len(commits),
        "bytes": sum(commit.get("bytes", 0) for commit in commits),
        "seconds": round(seconds, 3),
        "images_per_s": round(statuses["success"] / seconds, 2) if seconds else 0.0,
    }


def busy_seconds(spans: Iterable[tuple[float, float]]) -> float:
    """Return how long at least one of the (start, end) spans lasted: pauses between runs do not count."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
