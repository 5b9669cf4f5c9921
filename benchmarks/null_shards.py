"""Does the driver's memory grow with the number of shards, and what does a shard cost beside its work?

Runs shards of null work through the queue that `ingest` uses, on a local Ray with two workers: each returns a
commit of the usual size. Then these commits lie in a corpus (its tars and sidecars are empty files), `ingest` ends
that corpus as it ends every other, and `status --watch` looks at it, once and once more when a shard has been added.
Prints one JSON object; ratios above 1 mean less than the limit (100 MB, 10 ms a shard).

    python benchmarks/null_shards.py [--shards 40000]
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import ray

from infra.cluster import ClusterConfig, run_bounded, session
from infra.storage import Folder
from ingest.config import FetchConfig, IngestConfig, PlanConfig
from ingest.run import ingest
from pairmill.status import Watched
from shards.layout import PLAN, RAW, STATS_SUFFIX, shard_name
from shards.manifest import Manifest

WORKERS = 2
ROWS = 10_000
FIRST = 1000
LIMIT_BYTES, LIMIT_S = 100 * 2**20, 0.010


class NullWorker:
    """Answers at once, with what a shard's commit holds."""

    def run(self, shard: int) -> dict[str, Any]:
        """Return a commit of the size that a real one has."""
        return commit(shard)


def commit(shard: int) -> dict[str, Any]:
    """Return what a shard's `_stats.json` holds."""
    hosts = {f"host-{shard % 500}-{number}.example": {"timeout": number, "http_status": 3} for number in range(20)}
    by_status = {"success": 7_000, "failed_to_download": 2_900, "filtered": 100}
    counts = {"count": ROWS, "successes": 7_000, "by_status": by_status, "by_reason": {"timeout": 2_900, "aspect": 100}}
    times = {"start_time": 60.0 * shard, "end_time": 60.0 * shard + 100, "bytes": 10**9}
    digests = {"tar_sha256": "0" * 64, "sidecar_sha256": "0" * 64}
    return {"shard": f"{shard:05d}", **counts, **times, **digests, "by_host": hosts}


def add_shard(raw: Path, shard: int) -> None:
    """Put a shard's files in `raw`, of which only the commit holds anything."""
    for suffix in (".tar", ".parquet"):
        (raw / f"{shard_name(shard)}{suffix}").touch()
    (raw / f"{shard_name(shard)}{STATS_SUFFIX}").write_text(json.dumps(commit(shard)))


def ended(folder: Path, shards: int) -> dict[str, Any]:
    """Return what `ingest` and `status --watch` take, in CPU seconds, on a corpus whose shards are all there."""
    corpus = Folder(folder / "corpus")
    manifest = Manifest.open(corpus)
    manifest.begin(PLAN, PlanConfig(urls="rows.parquet"))
    manifest.finish(PLAN, {"rows_in": ROWS * shards, "rows_out": ROWS * shards, "parts": shards})
    raw = Path(corpus.path(RAW))
    raw.mkdir()
    for shard in range(shards - 1):
        add_shard(raw, shard)
    watched = Watched(corpus.url)
    cpu = [time.process_time()]
    assert watched.state()["shards_done"] == shards - 1
    cpu.append(time.process_time())
    add_shard(raw, shards - 1)
    assert watched.state()["shards_done"] == shards
    cpu.append(time.process_time())
    totals = ingest(corpus.url, IngestConfig(fetch=FetchConfig(contact="crawl@example.org")), ClusterConfig())
    cpu.append(time.process_time())
    assert (totals["shards"], totals["rows_in"]) == (shards, ROWS * shards)
    names = ("status_first_cpu_s", "status_tick_cpu_s", "completion_cpu_s")
    return {name: round(end - start, 2) for name, start, end in zip(names, cpu, cpu[1:], strict=False)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=40_000)
    shards = parser.parse_args().shards
    driver = psutil.Process()
    at_first = 0
    with session(ClusterConfig(cpus=WORKERS)):
        actor = ray.remote(NullWorker)
        outcomes = run_bounded(lambda _: actor.remote(), range(shards), workers=WORKERS, retries=0)
        started, cpu = 0.0, 0.0
        for done, outcome in enumerate(outcomes, 1):
            assert outcome.value["count"] == ROWS
            if done == FIRST:
                at_first = driver.memory_info().rss
                started, cpu = time.monotonic(), time.process_time()
        counted = shards - FIRST
        wall_s, cpu_s = (time.monotonic() - started) / counted, (time.process_time() - cpu) / counted
    in_queue = _peak_bytes()
    with tempfile.TemporaryDirectory(prefix="pairmill-bench-") as name:
        at_end = ended(Path(name), shards)
    at_most = _peak_bytes()
    result = {
        "shards": shards,
        "driver_bytes_after_1000": at_first,
        "driver_bytes_at_most": at_most,
        "growth_bytes": at_most - at_first,
        "of_which_in_the_queue": in_queue - at_first,
        "wall_ms_a_shard": round(wall_s * 1000, 2),
        "driver_cpu_ms_a_shard": round(cpu_s * 1000, 2),
        **at_end,
        "limit_over_growth": round(LIMIT_BYTES / max(1, at_most - at_first), 1),
        "limit_over_wall": round(LIMIT_S / wall_s, 1),
    }
    print(json.dumps(result, indent=2))


def _peak_bytes() -> int:
    """Return the most memory this process has had so far, from the system, which misses no moment."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
