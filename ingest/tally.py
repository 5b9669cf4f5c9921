"""What one shard cost and who failed it, for its commit file and for the metrics."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from infra import metrics
from ingest.crawl import Fetched
from ingest.urls import host_of
from shards.layout import Status

WORST_HOSTS = 20
FLUSH_EVERY_S = 2.0
STAGE = "ingest"


class Tally:
    """Counts the rows of one shard as they end. One thread only."""

    def __init__(self) -> None:
        self._started = time.time()
        self._clock = time.monotonic()
        self._flushed = self._clock
        self._outcomes: Counter[tuple[str, str]] = Counter()
        self._failures: Counter[tuple[str, str]] = Counter()
        self._new_failures: Counter[tuple[str, str]] = Counter()
        self._requests = self._bytes = self._new_bytes = 0

    def add(self, row: Mapping[str, Any], fetched: Fetched) -> None:
        """Count a row that has ended."""
        self._outcomes[(row["status"], row["reason"])] += 1
        self._requests += fetched.attempts
        size = len(fetched.body) if fetched.body is not None else 0
        self._bytes += size
        self._new_bytes += size
        if row["status"] != Status.SUCCESS:
            self._new_failures[(host_of(row["url"]) or "", row["reason"])] += 1
        if fetched.seconds:
            metrics.step_seconds().observe(fetched.seconds, tags={"step": "fetch"})

    def flush(self, in_flight: int, throttled: int = 0, *, now: bool = False) -> None:
        """Hand the counts to the metrics, at most every few seconds unless `now`."""
        clock = time.monotonic()
        if not now and clock - self._flushed < FLUSH_EVERY_S:
            return
        self._flushed = clock
        for (status, reason), count in self._outcomes.items():
            metrics.rows().inc(count, tags={"stage": STAGE, "status": status, "reason": reason})
        for (host, reason), count in self._new_failures.items():
            metrics.host_failures().inc(count, tags={"host": metrics.host_label(host), "reason": reason})
        if self._new_bytes:
            metrics.fetched_bytes().inc(self._new_bytes)
        self._failures.update(self._new_failures)
        self._outcomes.clear()
        self._new_failures.clear()
        self._new_bytes = 0
        metrics.in_flight().set(in_flight, tags={"pid": str(os.getpid())})
        metrics.throttled_hosts().set(throttled, tags={"pid": str(os.getpid())})
        metrics.observe_memory()

    def stats(self) -> dict[str, Any]:
        """Return what the commit file holds beside the counts: times in seconds since 1970, bytes, worst hosts."""
        by_host: dict[str, dict[str, int]] = {}
        for (host, reason), count in sorted(self._failures.items()):
            by_host.setdefault(host, {})[reason] = count
        worst = sorted(by_host.items(), key=lambda item: (-sum(item[1].values()), item[0]))[:WORST_HOSTS]
        return {
            "start_time": round(self._started, 3),
            "end_time": round(time.time(), 3),
            "seconds": round(time.monotonic() - self._clock, 3),
            "bytes": self._bytes,
            "requests": self._requests,
            "by_host": dict(worst),
        }

    def committed(self) -> None:
        """Tell the metrics that the shard is there."""
        metrics.shards().inc(1, tags={"stage": STAGE})
        metrics.shard_seconds().observe(time.monotonic() - self._clock, tags={"stage": STAGE})
