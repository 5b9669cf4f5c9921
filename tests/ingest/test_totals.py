"""Sums over very many commits: right, and in the same memory."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

from infra.storage import Folder
from ingest.totals import HOSTS_KEPT, Sums, read_commits, summed


def commit(number: int, hosts: dict[str, Any] | None = None) -> dict[str, Any]:
    more = {"start_time": 10.0 * number, "end_time": 10.0 * number + 5, "bytes": 7, "by_host": hosts or {}}
    return {"count": 10, "by_status": {"success": 9, "filtered": 1}, "by_reason": {"aspect": 1}, **more}


def test_commits_are_read_in_order_and_not_all_held_at_once(tmp_path: Path) -> None:
    number, hosts = 3000, {f"host-{host}.example": {"timeout": host, "http_status": 3} for host in range(20)}
    for shard in range(number):
        (tmp_path / f"{shard:05d}_stats.json").write_text(json.dumps(commit(shard, hosts)))
    names = [f"{shard:05d}" for shard in range(number)]
    summed(read_commits(Folder(tmp_path), names[:600]))  # what is imported and started once
    tracemalloc.start()
    try:
        totals = summed(read_commits(Folder(tmp_path), names))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert totals == {
        "rows_in": 10 * number,
        "by_status": {"filtered": number, "success": 9 * number}, "by_reason": {"aspect": number},
        "shards": number, "bytes": 7 * number, "seconds": 5.0 * number, "images_per_s": 1.8,
    }  # fmt: skip
    assert peak < 8 * 2**20
    found = [one["start_time"] for one in read_commits(Folder(tmp_path), names)]
    assert found == [10.0 * shard for shard in range(number)]


def test_the_worst_hosts_are_found_among_more_than_are_kept() -> None:
    sums = Sums()
    for shard in range(HOSTS_KEPT // 5):
        hosts: dict[str, Any] = {f"host-{shard}-{host}.example": {"dns": 1} for host in range(19)}
        sums.add(commit(shard, hosts | {"worst.example": {"dns": 2, "timeout": 1}}))
    first, *others = sums.worst_hosts(3).items()
    assert first == ("worst.example", 3 * HOSTS_KEPT // 5)
    assert [count for _, count in others] == [1, 1]
    assert len(sums.worst_hosts(10**9)) <= 2 * HOSTS_KEPT
