"""How much longer does a hostile web take than the good links in it alone?

Of the rows 73% are good, 15% dead (404, refused connections and names that do not resolve, a third each), 5% on
hosts that take the connection and never answer, 5% slow (half of them too slow to be waited for), 2% redirect in
circles. Real photographs on 200 loopback hosts, time limits as they are by default. Twice: once with 20 hosts for
each kind of hanging, refusing and too slow row, where a crawler soon knows them (`few_hosts`), and once with a host
for each such row, where it never does (`own_hosts`). Prints one JSON object: wall times, their ratio, how long the
run went on after the last picture (`tail_s`), and what became of the rows.

    python benchmarks/hostile_web.py [--rows 30000] [--photographs 300] [--repeats 1]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from aiohttp import web
from photographs import photographs, serving

from ingest.config import FetchConfig, IngestConfig, PlanConfig
from ingest.plan import plan
from ingest.worker import ShardWorker

ROWS_PER_SHARD = 10_000
GOOD_HOSTS, BAD_HOSTS = 200, 20
SHARES = {"good": 0.73, "missing": 0.05, "refused": 0.05, "unknown": 0.05, "hanging": 0.05, "too_slow": 0.025,
          "slow": 0.025, "loop": 0.02}  # fmt: skip
SLOW_S, SLOW_CHUNKS = 3.0, 12
TOO_SLOW_BYTES, TOO_SLOW_EVERY_S = 100, 0.5


def rows(kind: str, count: int, port: int, names: list[str], *, own_hosts: bool = False) -> list[str]:
    """Return URLs of one kind. Good hosts are 127.1.0.x, those of each bad kind of their own, or of each bad row."""
    lives = kind in ("good", "missing", "slow", "loop")
    group = 1 if lives else 1 + list(SHARES).index(kind)
    hosts = GOOD_HOSTS if lives else count if own_hosts else BAD_HOSTS
    urls = []
    for number in range(count):
        at = number % hosts
        host = f"127.{group}.{at // 250}.{1 + at % 250}"
        if kind == "unknown":
            urls.append(f"http://nobody-{at if own_hosts else number % 200}.invalid/{number}.jpg")
        elif kind == "refused":
            urls.append(f"http://{host}:9/{number}.jpg")
        else:
            urls.append(f"http://{host}:{port}/{kind}/{names[number % len(names)]}?row={number}")
    return urls


def routes(folder: Path) -> web.Application:
    """Return the server: a path for each kind of row."""
    bodies = {path.name: path.read_bytes() for path in folder.glob("*.jpg")}

    async def good(request: web.Request) -> web.StreamResponse:
        return web.Response(body=bodies[request.match_info["name"]], content_type="image/jpeg")

    async def hanging(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(3600)
        return web.Response()

    async def loop(request: web.Request) -> web.StreamResponse:
        step = int(request.query.get("step", "0"))
        raise web.HTTPFound(f"{request.path}?row={request.query['row']}&step={(step + 1) % 3}")

    async def trickle(request: web.Request) -> web.StreamResponse:
        body = bodies[request.match_info["name"]]
        response = web.StreamResponse(headers={"Content-Type": "image/jpeg", "Content-Length": str(len(body))})
        await response.prepare(request)
        is_bearable = request.path.startswith("/slow")
        step = -(-len(body) // SLOW_CHUNKS) if is_bearable else TOO_SLOW_BYTES
        with contextlib.suppress(ConnectionError):  # who is not waited for is left
            for start in range(0, len(body), step):
                await asyncio.sleep(SLOW_S / SLOW_CHUNKS if is_bearable else TOO_SLOW_EVERY_S)
                await response.write(body[start : start + step])
        return response

    application = web.Application()
    for kind, answer in {"good": good, "hanging": hanging, "loop": loop, "slow": trickle, "too_slow": trickle}.items():
        application.router.add_get(f"/{kind}/{{name}}", answer)
    return application


def crawl(folder: Path, urls: list[str]) -> tuple[float, float, Counter[str]]:
    """Make the shards of these rows; return wall time, time after the last picture (s), and rows by reason."""
    random.Random(0).shuffle(urls)
    folder.mkdir()
    pq.write_table(pa.table({"url": urls, "caption": [f"photograph number {n}" for n in range(len(urls))]}),
                   folder / "rows.parquet")  # fmt: skip
    corpus = folder / "corpus"
    plan(str(corpus), PlanConfig(urls=str(folder / "rows.parquet"), rows_per_shard=ROWS_PER_SHARD))
    parts = -(-len(urls) // ROWS_PER_SHARD)
    config = IngestConfig(fetch=FetchConfig(allow_private=True, robots=False))
    worker = ShardWorker(str(corpus), config)
    started, wall_started = time.monotonic(), time.time()
    try:
        with ThreadPoolExecutor(config.shards_at_once) as shards:
            list(shards.map(worker.run, range(parts)))
        wall_s = time.monotonic() - started
    finally:
        worker.close()
    reasons: Counter[str] = Counter()
    last = wall_started
    for path in sorted((corpus / "raw").glob("*.parquet")):
        for row in pq.read_table(path, columns=["status", "reason", "fetched_at"]).to_pylist():
            reasons[row["reason"] or row["status"]] += 1
            if row["status"] == "success":
                last = max(last, row["fetched_at"].timestamp())
    assert sum(reasons.values()) == len(urls)
    shutil.rmtree(folder)
    return wall_s, wall_s - (last - wall_started), reasons


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=30_000, help="all of them; 73% are good")
    parser.add_argument("--photographs", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pairmill-bench-") as name:
        folder = Path(name)
        names = [path.name for path in photographs(folder / "photographs", given.photographs)]
        with serving([__file__, str(folder / "photographs")]) as base:
            port = int(base.rsplit(":", 1)[1])
            counts = {kind: round(given.rows * share) for kind, share in SHARES.items()}
            lists = {"good": rows("good", counts["good"], port, names)}
            for who, own_hosts in (("few_hosts", False), ("own_hosts", True)):
                kinds = (rows(kind, count, port, names, own_hosts=own_hosts) for kind, count in counts.items())
                lists[who] = [url for urls in kinds for url in urls]
            runs: dict[str, list[tuple[float, float, Counter[str]]]] = {who: [] for who in lists}
            for number in range(given.repeats):
                for who, urls in lists.items():
                    runs[who].append(crawl(folder / f"{who}-{number}", list(urls)))
    walls = {who: statistics.median(one[0] for one in ended) for who, ended in runs.items()}
    hostile = [who for who in lists if who != "good"]
    result = {
        "rows": counts,
        "wall_s": {who: round(wall, 1) for who, wall in walls.items()},
        "tail_s": {who: round(ended[-1][1], 1) for who, ended in runs.items()},
        "by_reason": {who: dict(runs[who][-1][2]) for who in hostile},
        "ratio": {who: round(walls[who] / walls["good"], 2) for who in hostile},
    }
    print(json.dumps(result, indent=2))


async def _serve(folder: Path) -> None:
    runner = web.AppRunner(routes(folder), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "0.0.0.0", 0, backlog=1024)
    await site.start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    if len(sys.argv) == 2 and Path(sys.argv[1]).is_dir():
        asyncio.run(_serve(Path(sys.argv[1])))
    else:
        main()
