"""How far a corpus is: shards done, rate, bytes, failures by reason and by host, time left."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from infra.storage import Folder
from ingest.retry import passes
from ingest.totals import read_commits, summed
from pairmill import show
from shards.layout import PLAN, RAW
from shards.manifest import STAGES, Manifest
from shards.writer import committed

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
    commits = read_commits(raw, committed(raw))
    parts = [name for name in (folder / PLAN).names(".parquet") if name.startswith("part-")]
    total = len(parts) + sum(one.parts for one in passes(folder))
    sums, hosts = summed(commits), Counter[str]()
    for commit in commits:
        for host, failures in commit.get("by_host", {}).items():
            hosts[host] += sum(failures.values()) if isinstance(failures, dict) else failures
    handled = sum(commit["count"] for commit in commits)
    rate = handled / sums["seconds"] if sums["seconds"] else 0.0
    left = total - len(commits)
    return {
        "rows": sums["rows_in"],
        "by_status": sums["by_status"],
        "by_reason": dict(Counter(sums["by_reason"]).most_common()),
        "by_host": dict(hosts.most_common(HOSTS_SHOWN)),
        "shards_done": len(commits),
        "shards_total": total,
        "images_per_s": sums["images_per_s"],
        "bytes": sums["bytes"],
        "eta_s": left * handled / len(commits) / rate if commits and rate else None,
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
