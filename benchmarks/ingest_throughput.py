"""How many images does a CPU second yield, beside img2dataset, and how near is that to the least it can cost?

The same photographs from the same server, over HTTP and over HTTPS: `keep_ratio` to 256 pixels, quality 95,
SHA-256 of every body, no perceptual hash. Both run as their users run them, `pairmill ingest` on a local Ray with
one worker and img2dataset with one process. CPU is that of every process they start, in user and system time, of
a run over all images less a run over a few of them: start-up is left out on both sides. The server's own is not
counted. The floor is decode with DCT scaling, resize and encode alone, in one thread, by the best library here.

    python benchmarks/ingest_throughput.py [--images 3000] [--https-images 3000] [--folder DIR]
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import psutil
import simplejpeg
from photographs import certificate, photographs, served
from PIL import Image

FEW = 600
"""Enough for all daemons of Ray to have started by the end of the shorter run."""
LOOK_EVERY_S = 0.1
SIZE, QUALITY = 256, 95
SUBREAPER = 36  # prctl's option: what outlives its parent becomes ours, and its CPU time is told to us
PEER = """
import sys
from img2dataset import download
if __name__ == "__main__":
    download(url_list=sys.argv[1], output_folder=sys.argv[2], input_format="parquet", url_col="url",
        caption_col="caption", output_format="webdataset", processes_count=1, thread_count=32, image_size=256,
        resize_mode="keep_ratio", encode_quality=95, number_sample_per_shard=10000, compute_hash="sha256",
        disallowed_header_directives=[], enable_wandb=False, incremental_mode="incremental")
"""


def cpu_seconds(command: Sequence[str], environment: dict[str, str]) -> float:
    """Run a command; return the CPU time of it and of every process that came of it, in seconds.

    Looked at several times a second: Ray's daemon does not collect its workers' times for its parents. What a
    process does after the last look is lost, for a short run as for a long one.
    """
    own = psutil.Process()
    others = {process.pid for process in own.children()}
    spent: dict[tuple[int, float], float] = {}
    started = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    told: list[bytes] = []
    reader = threading.Thread(target=lambda: told.extend(started.communicate()))
    reader.start()
    while True:
        running = [one for child in own.children() if child.pid not in others for one in _tree(child)]
        for process in running:
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                spent[process.pid, process.create_time()] = times.user + times.system
        if not reader.is_alive() and not running:
            break
        _collect_orphans({*others, started.pid})
        time.sleep(LOOK_EVERY_S)
    if started.returncode:
        sys.exit(f"{' '.join(command[:4])} failed:\n{told[1].decode()[-2000:]}")
    return sum(spent.values())


def _tree(process: psutil.Process) -> list[psutil.Process]:
    try:
        alive = process.status() != psutil.STATUS_ZOMBIE
        return [process, *process.children(recursive=True)] if alive else []
    except psutil.Error:
        return []


def _collect_orphans(but: set[int]) -> None:
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error, ChildProcessError):
            if process.pid not in but and process.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(process.pid, 0)


def ours(rows: Path, folder: Path, environment: dict[str, str]) -> float:
    pairmill = [sys.executable, "-m", "pairmill.cli"]
    subprocess.run([*pairmill, "plan", str(folder), "--urls", str(rows)], check=True, capture_output=True)
    bundle = ["--fetch.ca-bundle", environment["SSL_CERT_FILE"]] if environment else []
    options = {
        "--image.size": SIZE, "--image.quality": QUALITY, "--workers": 1, "--cluster.cpus": 1,
        "--fetch.concurrency": 32,
        "--fetch.per-host-in-flight": 32, "--fetch.per-host-per-s": 0, "--image.min-side": 0,
    }  # fmt: skip
    words = [str(word) for pair in options.items() for word in pair]
    flags = ["--fetch.allow-private", "--fetch.no-robots", "--image.no-phash"]
    spent = cpu_seconds([*pairmill, "ingest", str(folder), *words, *flags, *bundle], {})
    assert successes(folder / "raw") == count_of(rows)
    return spent


def peers(rows: Path, folder: Path, environment: dict[str, str]) -> float:
    script = rows.with_name("peer.py")
    script.write_text(PEER)
    environment = environment | {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}
    spent = cpu_seconds([sys.executable, str(script), str(rows), str(folder)], environment)
    assert successes(folder) == count_of(rows)
    return spent


def successes(folder: Path) -> int:
    return sum(json.loads(path.read_text())["successes"] for path in folder.glob("*_stats.json"))


def count_of(rows: Path) -> int:
    import pyarrow.parquet as pq

    return int(pq.read_metadata(rows).num_rows)


def write_rows(path: Path, base: str, count: int) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    urls = [f"{base}/{number:05d}.jpg" for number in range(count)]
    captions = [f"photograph number {number} of a benchmark" for number in range(count)]
    pq.write_table(pa.table({"url": urls, "caption": captions}), path)
    return path


def ms_an_image(run: Callable[..., float], base: str, count: int, work: Path, environment: dict[str, str]) -> float:
    """Return the CPU time an image costs, in milliseconds, start-up left out."""
    spent = {}
    for number in (FEW, count):
        folder = work / f"{run.__name__}-{number}"
        spent[number] = run(write_rows(work / f"{number}.parquet", base, number), folder, environment)
        shutil.rmtree(folder)
    return (spent[count] - spent[FEW]) / (count - FEW) * 1000


def by_pillow(body: bytes) -> bytes:
    image = Image.open(io.BytesIO(body))
    scale = SIZE / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    image.draft("RGB", size)
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.HAMMING, reducing_gap=2.0).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def by_simplejpeg(body: bytes) -> bytes:
    height, width, *_ = simplejpeg.decode_jpeg_header(body)
    scale = SIZE / min(width, height)
    wide, high = round(width * scale), round(height * scale)
    pixels = simplejpeg.decode_jpeg(body, min_height=high, min_width=wide, min_factor=1)
    return simplejpeg.encode_jpeg(np.ascontiguousarray(_area(pixels, wide, high)), QUALITY, colorsubsampling="420")


def by_opencv(body: bytes) -> bytes:
    height, width, *_ = simplejpeg.decode_jpeg_header(body)
    scale = SIZE / min(width, height)
    wide, high = round(width * scale), round(height * scale)
    flags = {1: cv2.IMREAD_COLOR, 2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4}
    fits = [factor for factor in flags if min(width, height) // factor >= SIZE] or [1]
    pixels = cv2.imdecode(np.frombuffer(body, np.uint8), flags[max(fits)])
    return cv2.imencode(".jpg", _area(pixels, wide, high), [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()


def _area(pixels: np.ndarray, wide: int, high: int) -> np.ndarray:
    if pixels.shape[:2] == (high, wide):
        return pixels
    mode = cv2.INTER_AREA if pixels.shape[1] >= wide else cv2.INTER_LANCZOS4
    return cv2.resize(pixels, (wide, high), interpolation=mode)


def floors(paths: Sequence[Path]) -> dict[str, float]:
    """Return what decode, resize and encode alone cost by library, in CPU milliseconds an image."""
    cv2.setNumThreads(1)
    bodies = [path.read_bytes() for path in paths]
    found = {}
    for make in (by_pillow, by_simplejpeg, by_opencv):
        for body in bodies[:20]:
            make(body)
        started = time.process_time()
        for body in bodies:
            make(body)
        found[make.__name__] = (time.process_time() - started) / len(bodies) * 1000
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=3000, help="photographs over HTTP")
    parser.add_argument("--https-images", type=int, default=None, help="photographs over HTTPS; as many by default")
    parser.add_argument("--folder", type=Path, default=None, help="where the photographs are kept; a temporary one")
    given = parser.parse_args()
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    with tempfile.TemporaryDirectory(prefix="pairmill-bench-") as name:
        work = Path(name)
        paths = photographs((given.folder or work) / "photographs", given.images)
        sizes = [path.stat().st_size for path in paths]
        result: dict[str, object] = {"images": len(paths), "mean_bytes": round(sum(sizes) / len(sizes))}
        before = floors(paths)
        chain, bundle = certificate(work / "tls")
        for scheme, count in (("http", given.images), ("https", given.https_images or given.images)):
            secure = scheme == "https"
            with served(paths[0].parent, chain if secure else None) as base:
                environment = {"SSL_CERT_FILE": str(bundle)} if secure else {}
                costs = {run.__name__: ms_an_image(run, base, count, work, environment) for run in (ours, peers)}
            result[scheme] = {f"{who}_ms": round(cost, 2) for who, cost in costs.items()} | {
                "ratio": round(costs["peers"] / costs["ours"], 2)
            }
            if not secure:
                http = costs["ours"]
        # The machine's speed drifts: the floor is taken before and after.
        floor = {
            who: (cost + after) / 2 for (who, cost), after in zip(before.items(), floors(paths).values(), strict=True)
        }
        result["floor_ms"] = {who: round(cost, 2) for who, cost in floor.items()}
        result["share_of_floor_http"] = round(min(floor.values()) / http, 3)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
