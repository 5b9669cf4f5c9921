"""What does it cost that the shards lie in an object store 20 ms away, and not on the local disk?

The same shards (photographs of 256 px, 29 KB in the mean) through the same stream, decoded by Pillow in threads:
from a folder, and from a real S3 gateway behind a line that holds every answer back. Both are measured in turn, over
whole epochs after one to warm up, while the stream goes on reading ahead. Prints one JSON object; `ratio` is the
rate from the store by that from the disk. Gateway and line run on the same machine: the share of a core that they
took is told, and a decoder has to do without it.

    python benchmarks/stream_s3.py [--samples 2000] [--epochs 3] [--rounds 3] [--decoders 2] [--delay-ms 20]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import s3fs
from photographs import photographs, serving
from PIL import Image

from infra.storage import Folder
from shards import index
from shards.layout import SIDECAR, Reason, Status, sample_key, shard_name, sidecar_schema
from shards.stream import Sample, ShardStream
from shards.writer import writing

SIDE_PX, QUALITY, BYTES = 256, 95, 29_000
SHARD_SAMPLES = 500
SETTINGS: dict[str, Any] = {
    # Blocks of 18 samples, half a megabyte, are what a corpus of any size comes to at this size of pictures.
    "global_batch_size": 64, "lanes": 8, "block_samples": 18, "read_ahead_bytes": 16 * 2**20,
}  # fmt: skip


def write_shards(folder: Folder, samples: int, work: Path) -> Folder:
    pictures = [small(path) for path in photographs(work, min(samples, 400))]
    for first in range(0, samples, SHARD_SAMPLES):
        shard = first // SHARD_SAMPLES
        with writing(folder, shard_name(shard), sidecar_schema(pa.schema([])), {}) as writer:
            for row in range(min(SHARD_SAMPLES, samples - first)):
                fields = dict.fromkeys(SIDECAR.names) | {
                    "key": sample_key(shard, row), "url": f"http://h/{shard}/{row}.jpg",
                    "caption": f"photograph {row}", "status": Status.SUCCESS, "reason": Reason.NONE,
                }  # fmt: skip
                writer.add(fields, pictures[(first + row) % len(pictures)])
    index.save(folder, index.build(folder))
    return folder


def small(path: Path) -> bytes:
    """Return the photograph's middle at 256 px, at the quality that comes nearest to 29 KB from below."""
    image = Image.open(path).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side)).resize((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)
    for quality in range(QUALITY, 40, -5):
        buffer = io.BytesIO()
        square.save(buffer, "JPEG", quality=quality)
        if buffer.tell() <= BYTES:
            break
    return buffer.getvalue()


@dataclass
class Rate:
    """One measurement: samples a second by the clock, CPU of this process a sample, cores that the others took."""

    samples_per_s: float
    first_batch_s: float
    cpu_ms_a_sample: float
    other_cores: dict[str, float]


def measure(folder: str, samples: int, epochs: int, decoders: int, others: dict[str, psutil.Process]) -> Rate:
    opened = time.monotonic()
    stream = ShardStream(folder, epochs=1_000_000, **SETTINGS)
    with ThreadPoolExecutor(decoders) as pool:
        done, first, begun = 0, 0.0, (0.0, 0.0, dict[str, float]())
        batches = decoded(stream, pool)
        for batch in batches:
            now = time.monotonic()
            done += len(batch)
            first = first or now - opened
            if not begun[0] and done >= samples:
                begun, done = (now, time.process_time(), {name: cpu(one) for name, one in others.items()}), 0
            elif begun[0] and done >= samples * epochs:
                break
        wall = time.monotonic() - begun[0]
        spent = {name: round((cpu(one) - begun[2][name]) / wall, 2) for name, one in others.items()}
        rate = Rate(done / wall, first, (time.process_time() - begun[1]) / done * 1000, spent)
        batches.close()
    return rate


def decoded(stream: ShardStream, pool: ThreadPoolExecutor) -> Iterator[list[np.ndarray[Any, Any]]]:
    waiting: deque[list[Any]] = deque()
    for batch in stream:
        waiting.append([pool.submit(decode, sample) for sample in batch])
        if len(waiting) > 2:
            yield [future.result() for future in waiting.popleft()]


def decode(sample: Sample) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(sample["jpg"])).convert("RGB"))


def cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


class Line(asyncio.Protocol):
    """One direction of a connection; what comes in goes out `delay_s` later, unread."""

    def __init__(self, delay_s: float) -> None:
        self.delay_s, self.held = delay_s, deque[bytes]()
        self.other: Line | None = None
        self.out: asyncio.WriteTransport | None = None
        self.loop = asyncio.get_running_loop()

    def connection_made(self, transport: Any) -> None:
        self.out = transport

    def data_received(self, data: bytes) -> None:
        self.held.append(data)
        if self.other is None or self.other.out is None:
            return  # upstream is being connected to
        if self.delay_s:
            self.loop.call_later(self.delay_s, self.pass_on)
        else:
            self.pass_on()

    def pass_on(self) -> None:
        assert self.other is not None
        assert self.other.out is not None
        if self.held and not self.other.out.is_closing():
            self.other.out.write(self.held.popleft())

    def connection_lost(self, error: Exception | None) -> None:
        if self.other is not None and self.other.out is not None:
            self.other.out.close()


async def hold_back(upstream_port: int, delay_s: float) -> None:
    """Print this line's URL, and serve it."""
    loop, tasks = asyncio.get_running_loop(), set[asyncio.Task[None]]()

    async def connect(near: Line) -> None:
        far = Line(delay_s)
        near.other, far.other = far, near
        await loop.create_connection(lambda: far, "127.0.0.1", upstream_port)
        while near.held:
            near.pass_on()

    def near() -> Line:
        line = Line(0.0)
        task = loop.create_task(connect(line))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return line

    server = await loop.create_server(near, "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await asyncio.Event().wait()


@contextlib.contextmanager
def gateway(folder: Path) -> Iterator[Any]:
    """The tests' S3 server with its bucket; clients find it by the environment."""
    place = Path(__file__).parent.parent / "tests" / "conftest.py"
    spec = importlib.util.spec_from_file_location("gateway", place)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["gateway"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    server = module.S3Gateway(folder)
    try:
        server.start()
        os.environ |= server.env
        module._make_bucket(server)
        yield server
    finally:
        server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--decoders", type=int, default=2)
    parser.add_argument("--delay-ms", type=float, default=20.0)
    parser.add_argument("--line-to", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.line_to:
        import uvloop

        uvloop.run(hold_back(options.line_to, options.delay_ms / 1000))
        return
    with tempfile.TemporaryDirectory() as work, gateway(Path(work)) as server:
        here = write_shards(Folder(f"{work}/shards"), options.samples, Path(work) / "photographs")
        there = Folder(server.url("shards"))
        for name in here.names():
            there.write(name, here.read(name))
        line = [__file__, "--line-to", str(server.port), "--delay-ms", str(options.delay_ms)]
        with serving(line) as url:
            os.environ["AWS_ENDPOINT_URL"] = url
            s3fs.S3FileSystem.clear_instance_cache()
            print(json.dumps(compare(here.url, there.url, options, server.process.pid), indent=2))


def compare(here: str, there: str, options: argparse.Namespace, gateway_pid: int) -> dict[str, Any]:
    (line,) = (one for one in psutil.Process().children() if "--line-to" in one.cmdline())
    others = {"gateway": psutil.Process(gateway_pid), "line": line}
    asked = (options.samples, options.epochs, options.decoders)
    local, remote = [], []
    for _ in range(options.rounds):
        local.append(measure(here, *asked, {}))
        remote.append(measure(there, *asked, others))
    rates = [statistics.median(rate.samples_per_s for rate in side) for side in (local, remote)]
    return {
        "bytes_a_sample": round(index.load(Folder(here)).tar_bytes / options.samples),
        "decoders": options.decoders,
        "local_samples_per_s": round(rates[0]),
        "s3_samples_per_s": round(rates[1]),
        "ratio": round(
            statistics.median(b.samples_per_s / a.samples_per_s for a, b in zip(local, remote, strict=True)), 3
        ),
        "ratios": [round(b.samples_per_s / a.samples_per_s, 3) for a, b in zip(local, remote, strict=True)],
        "local_first_batch_s": round(statistics.median(rate.first_batch_s for rate in local), 2),
        "s3_first_batch_s": round(statistics.median(rate.first_batch_s for rate in remote), 2),
        "local_cpu_ms_a_sample": round(statistics.median(rate.cpu_ms_a_sample for rate in local), 2),
        "s3_cpu_ms_a_sample": round(statistics.median(rate.cpu_ms_a_sample for rate in remote), 2),
        "cores_taken": {name: statistics.median(rate.other_cores[name] for rate in remote) for name in others},
    }


if __name__ == "__main__":
    main()
