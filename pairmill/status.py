"""How far a corpus is: shards done, rate, bytes, failures by reason and by host, time left."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from infra.storage import Folder
from ingest.retry import passes
from ingest.totals import Sums, read_commits
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
    return Watched(corpus).state()


class Watched:
    """A corpus that is looked at again and again: each commit is read once and added to the sums of the others."""

    def __init__(self, corpus: str) -> None:
        self._folder = Folder(corpus)
        self._seen: set[str] = set()
        self._sums = Sums()

    def state(self) -> dict[str, Any]:
        """Return the state now, as `status` does."""
        folder, manifest = self._folder, Manifest.existing(self._folder)
        sums = self._read(folder / RAW)
        totals = sums.totals()
        total = _planned_parts(folder, manifest) + sum(one.parts for one in passes(folder))
        rate = sums.handled / totals["seconds"] if totals["seconds"] else 0.0
        left = total - sums.shards
        return {
            "rows": totals["rows_in"],
            "by_status": totals["by_status"],
            "by_reason": dict(Counter(totals["by_reason"]).most_common()),
            "by_host": sums.worst_hosts(HOSTS_SHOWN),
            "shards_done": sums.shards,
            "shards_total": total,
            "images_per_s": totals["images_per_s"],
            "bytes": totals["bytes"],
            "eta_s": left * sums.handled / sums.shards / rate if rate else None,
            "stages": {stage: {"done": manifest.is_done(stage), "totals": manifest.totals(stage)} for stage in STAGES},
        }

    def _read(self, raw: Folder) -> Sums:
        names = committed(raw)
        if not self._seen.issubset(names):  # shards have gone, to be made again
            self._seen, self._sums = set(), Sums()
        new = [name for name in names if name not in self._seen]
        for name, commit in zip(new, read_commits(raw, new), strict=True):
            self._sums.add(commit)
            self._seen.add(name)
        return self._sums


def _planned_parts(folder: Folder, manifest: Manifest) -> int:
    if manifest.is_done(PLAN):
        return int(manifest.totals(PLAN)["parts"])
    return sum(name.startswith("part-") for name in (folder / PLAN).names(".parquet"))


def render(state: dict[str, Any]) -> None:
    """Show the state to a person on standard output."""
    show.mapping({name: value for name, value in state.items() if not isinstance(value, dict)})
    for title in ("by_status", "by_reason", "by_host"):
        if state[title]:
            show.console.print(f"[bold]{title}")
            show.mapping(state[title])


def watch(corpus: str) -> None:
    """Show the state anew every `WATCH_EVERY_S` seconds until Ctrl-C, or until every shard is done."""
    watched = Watched(corpus)
    while True:
        state = watched.state()
        show.console.clear()
        render(state)
        if state["stages"][RAW]["done"]:
            return
        time.sleep(WATCH_EVERY_S)
