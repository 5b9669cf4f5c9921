"""Does the driver's memory grow with the number of shards, and what does a shard cost beside its work?

Runs shards of null work through the queue that `ingest` uses, on a local Ray with two workers: each returns a
commit of the usual size. Prints one JSON object; ratios above 1 mean less than the limit (100 MB, 10 ms a shard).

    python benchmarks/null_shards.py [--shards 40000]
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import psutil
import ray

from infra.cluster import ClusterConfig, run_bounded, session

WORKERS = 2
FIRST = 1000
LIMIT_BYTES, LIMIT_S = 100 * 2**20, 0.010


class NullWorker:
    """Answers at once, with what a shard's commit holds."""

    def run(self, shard: int) -> dict[str, Any]:
        """Return a commit of the size that a real one has."""
        hosts = {f"host-{number}.example": {"timeout": number, "http_status": 3} for number in range(20)}
        counts = {"count": 10_000, "successes": 7_000, "failed_to_download": 2_900, "filtered": 100}
        digests = {"tar_sha256": "0" * 64, "sidecar_sha256": "0" * 64}
        return {"shard": f"{shard:05d}", **counts, **digests, "by_host": hosts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=40_000)
    shards = parser.parse_args().shards
    driver = psutil.Process()
    at_first = at_most = 0
    with session(ClusterConfig(cpus=WORKERS)):
        actor = ray.remote(NullWorker)
        outcomes = run_bounded(lambda _: actor.remote(), range(shards), workers=WORKERS, retries=0)
        started, cpu = 0.0, 0.0
        for done, outcome in enumerate(outcomes, 1):
            assert outcome.value["count"] == 10_000
            if done == FIRST:
                at_first = at_most = driver.memory_info().rss
                started, cpu = time.monotonic(), time.process_time()
            elif done % FIRST == 0:
                at_most = max(at_most, driver.memory_info().rss)
        counted = shards - FIRST
        wall_s, cpu_s = (time.monotonic() - started) / counted, (time.process_time() - cpu) / counted
    result = {
        "shards": shards,
        "driver_bytes_after_1000": at_first,
        "driver_bytes_at_most": at_most,
        "growth_bytes": at_most - at_first,
        "wall_ms_a_shard": round(wall_s * 1000, 2),
        "driver_cpu_ms_a_shard": round(cpu_s * 1000, 2),
        "limit_over_growth": round(LIMIT_BYTES / max(1, at_most - at_first), 1),
        "limit_over_wall": round(LIMIT_S / wall_s, 1),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
