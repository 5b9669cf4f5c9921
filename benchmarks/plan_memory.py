"""How much memory does a plan take as its rows grow, and how long would one of 100 million rows take?

Rows are written as parquet (URLs of 60 to 140 characters on a host for every 20 rows, a third of them with a query,
a caption each) and planned by `pairmill plan` in a process of its own, of which the memory is sampled. Memory that
merely maps the sorted runs' file is counted apart: the system takes it back whenever it likes. Prints one JSON
object; a ratio of memory near 1 says that it does not follow the number of rows.

    python benchmarks/plan_memory.py [--rows 2000000 8000000]
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

WANTED_ROWS = 100_000_000
ROW_GROUP = 100_000
WORDS = ("red", "blue", "small", "old", "wooden", "chair", "dog", "river", "bridge", "market", "a", "of", "with", "on")


def write_rows(path: Path, rows: int) -> None:
    """Write `rows` rows as one parquet file, never more than a row group in memory."""
    schema = pa.schema({"url": pa.string(), "caption": pa.string()})
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, rows, ROW_GROUP):
            draw = random.Random(first)
            count = min(ROW_GROUP, rows - first)
            urls = [_url(draw, first + at, rows) for at in range(count)]
            captions = [" ".join(draw.choices(WORDS, k=draw.randint(4, 20))) for _ in range(count)]
            writer.write_table(pa.table({"url": urls, "caption": captions}, schema))


def _url(draw: random.Random, row: int, rows: int) -> str:
    query = f"?w={draw.randint(100, 2000)}&id={row}" if row % 3 == 0 else ""
    return f"https://host-{draw.randrange(max(1, rows // 20))}.example/{'x' * draw.randint(10, 90)}/{row}.jpg{query}"


def measured(rows: Path, corpus: Path) -> dict[str, Any]:
    """Plan `rows` in a process of its own; return its peak memory in bytes and its CPU seconds."""
    command = [sys.executable, "-m", "pairmill.cli", "plan", str(corpus), "--urls", str(rows)]
    own, mapped, cpu_s = 0, 0, 0.0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        watched = psutil.Process(child.pid)
        while child.poll() is None:
            status = Path(f"/proc/{child.pid}/status").read_text()
            held = {kind: int(kb) * 1024 for kind, kb in re.findall(r"Rss(Anon|File):\s+(\d+) kB", status)}
            if held:
                own, mapped = max(own, held["Anon"]), max(mapped, held["File"])
                times = watched.cpu_times()
                cpu_s = times.user + times.system
            time.sleep(0.05)
        if child.returncode:
            raise SystemExit(f"plan failed: {child.stderr.read() if child.stderr else ''}")
    return {"own_bytes": own, "mapped_bytes": mapped, "cpu_s": round(cpu_s, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs=2, default=(2_000_000, 8_000_000), metavar=("FEW", "MANY"))
    few, many = parser.parse_args().rows
    results = {}
    for rows in (few, many):
        with tempfile.TemporaryDirectory(prefix="pairmill-bench-") as name:
            write_rows(Path(name) / "rows.parquet", rows)
            results[rows] = measured(Path(name) / "rows.parquet", Path(name) / "corpus")
    more, seconds = many - few, results[many]["cpu_s"] - results[few]["cpu_s"]
    growth = (results[many]["own_bytes"] - results[few]["own_bytes"]) / more
    result = {
        **{f"{rows}_rows": found for rows, found in results.items()},
        "memory_of_many_over_few": round(results[many]["own_bytes"] / results[few]["own_bytes"], 2),
        "bytes_a_row_more": round(growth, 1),
        "cpu_us_a_row": round(seconds / more * 1e6, 1),
        "projected": {
            "rows": WANTED_ROWS,
            "own_bytes": round(results[many]["own_bytes"] + growth * (WANTED_ROWS - many)),
            "cpu_hours": round((results[many]["cpu_s"] + seconds / more * (WANTED_ROWS - many)) / 3600, 2),
        },
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
