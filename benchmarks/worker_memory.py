"""How much memory does a worker take while it makes shards of 10,000 rows?

Real photographs (a few hundred of them, asked for again under other names), two shards in hand, perceptual hashes on:
the defaults. Prints one JSON object; a ratio above 1 means less than the limit of 1 GB.

With --hostile, what a decoder process takes for pictures that are small files and as large as `max_pixels` lets them
be, each kind by itself, and for 64 pictures that each bring a colour profile of their own.

    python benchmarks/worker_memory.py [--rows 20000] [--photographs 300] [--hostile]
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from photographs import photographs, served
from PIL import Image

from infra.memory import PeakMemory, tree_memory_bytes
from ingest.config import FetchConfig, IngestConfig, PlanConfig
from ingest.decoding import Decoders
from ingest.plan import plan
from ingest.worker import ShardWorker
from pairmill.sample_web.icc import adobe_rgb_profile
from shards.layout import Status

LIMIT_BYTES = 10**9
ROWS_PER_SHARD = 10_000
SIDES = (8000, 7990)
"""Just below `max_pixels`."""
MARK = b"########"


def hostile() -> dict[str, Any]:
    """Return the peak of a decoder process, in bytes, for each kind of hostile picture, and the worst of them."""
    peaks: dict[str, int] = {}
    for name, bodies in hostile_pictures():
        peaks[name] = _decoder_peak_bytes(bodies)
    worst = max(peaks.values())
    return {**peaks, "worst": worst, "bound_over_worst": round(IngestConfig().decoder_bytes / worst, 2)}


def hostile_pictures() -> Iterator[tuple[str, list[bytes]]]:
    """Yield bodies by kind: flat pictures of 8000 x 7990 pixels, and small ones with a profile of 3 or 15 MB."""
    flat: dict[str, tuple[str, str, dict[str, Any]]] = {
        "png_16_bit": ("I;16", "PNG", {}),
        "tiff_32_bit": ("I", "TIFF", {"compression": "tiff_adobe_deflate"}),
        "tiff_float": ("F", "TIFF", {"compression": "tiff_adobe_deflate"}),
        "png_rgb": ("RGB", "PNG", {}),
        "png_rgba": ("RGBA", "PNG", {}),
        "png_grey_alpha": ("LA", "PNG", {}),
        "jpeg_progressive": ("RGB", "JPEG", {"progressive": True, "subsampling": 0}),
        "jpeg_cmyk": ("CMYK", "JPEG", {"progressive": True}),
        "gif": ("P", "GIF", {}),
        "webp": ("RGB", "WEBP", {"quality": 50, "method": 0}),
    }
    for name, (mode, form, options) in flat.items():
        yield name, [_encoded(Image.new(mode, SIDES), form, **options)]
    profiled = []
    for size in (3 * 10**6, 15 * 10**6):
        body = _encoded(Image.new("RGB", (256, 256)), "JPEG", icc_profile=adobe_rgb_profile() + MARK + bytes(size))
        profiled += [body.replace(MARK, f"{number:0{len(MARK)}d}".encode()) for number in range(32)]
    yield "profiles", profiled


def _encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _decoder_peak_bytes(bodies: list[bytes]) -> int:
    """Return the most that a decoder process had in memory, in bytes; it must take every body."""
    decoders = Decoders(IngestConfig())
    try:
        for body in bodies:
            facts, _ = decoders.submit(body).result()
            assert facts["status"] == Status.SUCCESS, facts
        (process,) = psutil.Process().children()
        status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    finally:
        decoders.close()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--photographs", type=int, default=300)
    parser.add_argument("--hostile", action="store_true")
    given = parser.parse_args()
    if given.hostile:
        print(json.dumps(hostile(), indent=2))
        return
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
