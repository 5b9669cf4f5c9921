"""How much memory does a worker take while it makes shards of 10,000 rows?

Real photographs (a few hundred of them, asked for again under other names), two shards in hand, perceptual hashes on:
the defaults. Prints one JSON object; a ratio above 1 means less than the limit of 1 GB.

    python benchmarks/worker_memory.py [--rows 20000] [--photographs 300]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from photographs import photographs, served

from infra.memory import PeakMemory, tree_memory_bytes
from ingest.config import FetchConfig, IngestConfig, PlanConfig
from ingest.plan import plan
from ingest.worker import ShardWorker

LIMIT_BYTES = 10**9
ROWS_PER_SHARD = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--photographs", type=int, default=300)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pairmill-bench-") as name:
        folder = Path(name)
        paths = photographs(folder / "photographs", given.photographs)
        with served(paths[0].parent) as base:
            urls = [f"{base}/{paths[row % len(paths)].name}?row={row}" for row in range(given.rows)]
            captions = [f"photograph number {row} of a benchmark" for row in range(given.rows)]
            pq.write_table(pa.table({"url": urls, "caption": captions}), folder / "rows.parquet")
            corpus = folder / "corpus"
            plan(str(corpus), PlanConfig(urls=str(folder / "rows.parquet"), rows_per_shard=ROWS_PER_SHARD))
            before = tree_memory_bytes()
            fetch = FetchConfig(allow_private=True, robots=False, per_host_per_s=0, per_host_in_flight=64)
            worker = ShardWorker(str(corpus), IngestConfig(fetch=fetch))
            with PeakMemory() as memory, ThreadPoolExecutor(2) as shards:
                made = list(shards.map(worker.run, range(given.rows // ROWS_PER_SHARD)))
            worker.close()
    assert sum(one["successes"] for one in made) == given.rows
    result = {
        "rows": given.rows,
        "peak_bytes": memory.peak_bytes,
        "of_which_before_the_worker": before,
        "limit_over_peak": round(LIMIT_BYTES / memory.peak_bytes, 2),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
