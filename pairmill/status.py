"""How far a corpus is: shards done, rate, bytes, failures by reason and by host, time left."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from infra.storage import Folder
from ingest.run import busy_seconds
from pairmill import show
from shards.layout import PLAN, RAW, STATS_SUFFIX
from shards.manifest import STAGES, Manifest

WATCH_EVERY_S = 2.0
HOSTS_SHOWN = 20


def status(corpus: str) -> dict[str, Any]:
    """Return the corpus' state, read from its manifest, plan parts and raw commits.

    `rows`, `by_status`, `by_reason` and `bytes` count what ingest has committed; `images_per_s` is taken over the
    time in which any shard was in hand, so pauses between runs do not count; `eta_s` is None before the first
    commit.

    Raises:
        UserError: there is no corpus at `corpus`.
    """
    folder = Folder(corpus)
    manifest = Manifest.existing(folder)
    raw = folder / RAW
    commits = [raw.read_json(name) for name in raw.names(STATS_SUFFIX)]
    parts = [name for name in (folder / PLAN).names(".parquet") if name.startswith("part-")]
    statuses, reasons, hosts = Counter[str](), Counter[str](), Counter[str]()
    for commit in commits:
        statuses.update(commit["by_status"])
        reasons.update(commit["by_reason"])
        for host, failures in commit.get("by_host", {}).items():
            hosts[host] += sum(failures.values()) if isinstance(failures, dict) else failures
    seconds = busy_seconds((commit["start_time"], commit["end_time"]) for commit in commits if "end_time" in commit)
    rate = sum(statuses.values()) / seconds if seconds else 0.0
    left = len(parts) - len(commits)
    return {
        "rows": sum(statuses.values()),
        "by_status": dict(statuses),
        "by_reason": dict(reasons.most_common()),
        "by_host": dict(hosts.most_common(HOSTS_SHOWN)),
        "shards_done": len(commits),
        "shards_total": len(parts),
        "images_per_s": statuses["success"] / seconds if seconds else 0.0,
        "bytes": sum(commit.get("bytes", 0) for commit in commits),
        "eta_s": left * sum(statuses.values()) / len(commits) / rate if commits and rate else None,
        "stages": {stage: {"done": manifest.is_done(stage), "totals": manifest.totals(stage)} for stage in STAGES},
    }


def render(state: dict[str, Any]) -> None:
    """Show the state to a person on standard output."""
    show.mapping({name: value for name, value in state.items() if not isinstance(value, dict)})
    for title in ("by_status", "by_reason", "by_host"):
        if state[title]:
            show.console.print(f"[bold]{title}")
            show.mapping(state[title])


def watch(corpus: str) -> None:
    """Show the state anew every `WATCH_EVERY_S` seconds until Ctrl-C, or until every shard is done."""
    while True:
        state = status(corpus)
        show.console.clear()
        render(state)
        if state["stages"][RAW]["done"]:
            return
        time.sleep(WATCH_EVERY_S)
