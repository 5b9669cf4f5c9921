"""How many images a second does the stream yield beside webdataset, and how near is that to decoding alone?

The same shards (photographs of 256 px), the same random crop to 224 px, batches of 256 pictures, two workers.
webdataset shuffles its shards and 1,000 samples, the stream its blocks; both run through the ends of epochs.
webdataset is measured twice: `webdataset` with our crop and our way of making a batch of it (uint8, straight into
shared memory), and `usual` the way its users have it: `decode("pil")`, the same crop, a float tensor that is
normalised in the worker, its own batching. A part runs in a process of its own, round by round, and what is counted
is CPU time of all its processes between the end of a first epoch and the end of the last: start-up is left out on
both sides. The limit is Pillow alone, from memory, in two processes at once (two cores may be two threads of one).
Then records without decoding, in one process.

    python benchmarks/loader_throughput.py [--samples 4000] [--batch 256] [--epochs 4] [--rounds 3] [--webdataset DIR]

`make bench` brings webdataset 1.0.2 to `.venv/webdataset-1`, the default of `--webdataset`.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from peers import WEBDATASET, WEBDATASET_FOLDER, found
from photographs import photographs
from PIL import Image

from infra.storage import Folder
from shards import index
from shards.access import Samples
from shards.layout import SIDECAR, Status, sample_key, shard_name, sidecar_schema
from shards.loader import Loader
from shards.pictures import RandomCrop, collated, drawn
from shards.stream import ShardStream
from shards.writer import writing

BATCH, WORKERS, SHARDS, SIDE, QUALITY, DISTINCT = 256, 2, 8, 256, 90, 800
MEAN, STD = torch.tensor([0.481, 0.458, 0.408]).view(3, 1, 1), torch.tensor([0.269, 0.261, 0.276]).view(3, 1, 1)
RECORD_LANES = 8
"""Of the stream of records: one process needs few."""


def write_shards(folder: Folder, samples: int, work: Path, distinct: int = DISTINCT) -> int:
    """Write the shards; return the mean size of a picture in bytes. `distinct` pictures come again and again."""
    bodies = [_small(path) for path in photographs(work / "photographs", min(samples, distinct))]
    for shard in range(SHARDS):
        with writing(folder, shard_name(shard), sidecar_schema(), {}) as writer:
            for row in range(samples // SHARDS):
                number = shard * (samples // SHARDS) + row
                fields: dict[str, Any] = dict.fromkeys(SIDECAR.names)
                fields |= {
                    "key": sample_key(shard, row), "url": f"http://photographs/{number}.jpg",
                    "caption": f"photograph number {number} of a benchmark, with a caption of usual length",
                    "status": Status.SUCCESS, "reason": "",
                }  # fmt: skip
                writer.add(fields, bodies[number % len(bodies)])
    index.save(folder, index.build(folder))
    return sum(map(len, bodies)) // len(bodies)


def _small(path: Path) -> bytes:
    image = Image.open(path).convert("RGB")
    scale = SIDE / min(image.size)
    out = io.BytesIO()
    size = (round(image.width * scale), round(image.height * scale))
    image.resize(size, Image.Resampling.BICUBIC).save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


def _tars(folder: str, epochs: int) -> tuple[list[str], int]:
    """Return the tars of so many epochs for webdataset, which runs through them, and how many to shuffle at a time.

    As one pass: at the end of one it would empty its buffers, and fill them anew, while its workers wait.
    """
    tars = [Folder(folder).path(f"{name}.tar") for name in index.shard_names(Folder(folder))]
    return tars * epochs, len(tars)


def by_webdataset(folder: str, epochs: int, batch: int, crop: RandomCrop) -> Iterator[int]:
    """Yield how many samples each batch has."""
    import webdataset as wds

    tars, shuffled = _tars(folder, epochs)
    dataset = wds.WebDataset(tars, shardshuffle=shuffled, seed=0).shuffle(1000)
    dataset = dataset.map(functools.partial(_cropped, crop)).batched(batch // WORKERS, collation_fn=collated)
    for made in wds.WebLoader(dataset, batch_size=None, num_workers=WORKERS):
        yield len(made["txt"])


def _cropped(crop: RandomCrop, sample: dict[str, Any]) -> dict[str, Any]:
    sample["__epoch__"] = 0
    crop(sample)
    return sample


def by_usual_webdataset(folder: str, epochs: int, batch: int, crop: RandomCrop) -> Iterator[int]:
    """Yield how many samples each batch has: pictures are float32 and normalised when they leave the worker."""
    import webdataset as wds

    tars, shuffled = _tars(folder, epochs)
    dataset = wds.WebDataset(tars, shardshuffle=shuffled, seed=0).shuffle(1000).decode("pil")
    dataset = dataset.map(functools.partial(_normalised, crop)).to_tuple("jpg", "txt").batched(batch // WORKERS)
    for _, texts in wds.WebLoader(dataset, batch_size=None, num_workers=WORKERS):
        yield len(texts)


def _normalised(crop: RandomCrop, sample: dict[str, Any]) -> dict[str, Any]:
    image = sample["jpg"]
    box = crop.box(*image.size, drawn(crop.seed, 0, sample["__key__"]))
    small = image.resize((crop.side, crop.side), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous().float().div_(255)
    return sample | {"jpg": pixels.sub_(MEAN).div_(STD)}


def by_stream(folder: str, epochs: int, batch: int, crop: RandomCrop, threads: bool) -> Iterator[int]:
    """Yield how many samples each batch has; with worker processes, or with decoding threads."""
    stream = ShardStream(
        folder, global_batch_size=batch, epochs=epochs, decode=crop, decode_threads=WORKERS if threads else 0
    )
    for made in Loader(stream, workers=0 if threads else WORKERS, transform=collated):
        yield len(made["txt"])


def records_of_webdataset(folder: str, epochs: int, _: int) -> Iterator[int]:
    """Yield 1 for each sample, not decoded."""
    import webdataset as wds

    tars, shuffled = _tars(folder, epochs)
    for _ in wds.WebDataset(tars, shardshuffle=shuffled, seed=0).shuffle(1000):
        yield 1


def records_of_stream(folder: str, epochs: int, batch: int) -> Iterator[int]:
    """Yield how many samples each batch has, not decoded."""
    for samples in ShardStream(folder, global_batch_size=batch, lanes=RECORD_LANES, epochs=epochs):
        yield len(samples)


def decoding_alone(folder: str, epochs: int, crop: RandomCrop) -> Iterator[int]:
    """Yield 1 for each picture that is decoded and cropped, from memory, here; others do the same beside it."""
    all_samples = Samples(folder)
    samples = [all_samples[number] | {"__epoch__": 0} for number in range(min(len(all_samples), 2 * DISTINCT))]
    parent = os.getpid()
    beside = any(os.fork() == 0 for _ in range(WORKERS - 1))
    while beside and os.getppid() == parent:
        for sample in samples[:50]:
            crop(dict(sample))
    if beside:
        os._exit(0)
    for _ in range(epochs):
        for sample in samples:
            crop(dict(sample))
            yield 1


PARTS = {
    "webdataset": lambda *of: by_webdataset(*of, RandomCrop(decoder="pillow")),
    "usual": lambda *of: by_usual_webdataset(*of, RandomCrop(decoder="pillow")),
    "processes": lambda *of: by_stream(*of, RandomCrop(decoder="pillow"), False),
    "threads": lambda *of: by_stream(*of, RandomCrop(decoder="pillow"), True),
    "turbo_processes": lambda *of: by_stream(*of, RandomCrop(), False),
    "turbo_threads": lambda *of: by_stream(*of, RandomCrop(), True),
    "limit": lambda folder, epochs, _: decoding_alone(folder, epochs, RandomCrop(decoder="pillow")),
    "turbo_limit": lambda folder, epochs, _: decoding_alone(folder, epochs, RandomCrop()),
    "records_webdataset": records_of_webdataset,
    "records": records_of_stream,
}


def measure(part: str, folder: str, epochs: int, first: int, batch: int) -> None:
    """Run a part here; print CPU and wall seconds a sample, counted from the end of the first `first` samples."""
    torch.set_num_threads(1)
    done, begun = 0, None
    is_limit = part.endswith("limit")
    # One epoch more than is counted: workers that are done take their time along.
    counts = PARTS[part](folder, epochs + 1, batch)  # held, or its workers would be gone before they are looked at
    for count in counts:
        done += count
        if begun is None and done >= first:
            begun = (done, _cpu(not is_limit), time.monotonic())
        if done >= first * epochs:
            break
    assert begun is not None
    samples, at_once = done - begun[0], WORKERS if is_limit else 1
    spent, wall = _cpu(not is_limit) - begun[1], time.monotonic() - begun[2]
    print(json.dumps({"cpu": spent / samples, "wall": wall / samples / at_once}))
    sys.stdout.flush()
    os._exit(0)


def _cpu(with_children: bool) -> float:
    own = psutil.Process()
    times = [process.cpu_times() for process in [own, *(own.children(recursive=True) if with_children else [])]]
    return sum(one.user + one.system for one in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--distinct", type=int, default=DISTINCT, help="pictures, that come again and again")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--epochs", type=int, default=4, help="2 or more, the first of which is not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), help="those to run")
    parser.add_argument("--webdataset", type=Path, default=WEBDATASET_FOLDER, help="folder with webdataset 1.0.2")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        measure(given.part, given.folder, given.epochs, given.samples, given.batch)
    if given.epochs < 2 or given.samples < given.batch:
        parser.error("give 2 epochs or more, and the samples of a batch at least")
    with tempfile.TemporaryDirectory(prefix="pairmill-bench-") as name:
        mean_bytes = write_shards(Folder(f"{name}/shards"), given.samples, Path(name), given.distinct)
        results: dict[str, list[dict[str, float]]] = {part: [] for part in given.parts}
        paths = [str(found(given.webdataset, "webdataset", WEBDATASET)), *sys.path]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        for _ in range(given.rounds):
            for part in given.parts:
                epochs = given.epochs * (8 if part.startswith("records") else 1)
                whole = given.samples // given.batch * given.batch
                first = min(given.samples, 2 * DISTINCT) if part.endswith("limit") else whole
                command = [sys.executable, __file__, "--part", part, "--folder", f"{name}/shards"]
                command += ["--epochs", str(epochs), "--samples", str(first), "--batch", str(given.batch)]
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
                results[part].append(json.loads(done.stdout))
    print(json.dumps({"picture_bytes": mean_bytes} | summary(results), indent=2))


def summary(results: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Return medians over the rounds: CPU milliseconds a sample, samples a second, and what they are to each other."""
    result: dict[str, Any] = {
        part: {
            "cpu_ms": round(statistics.median(one["cpu"] for one in rounds) * 1000, 4),
            "a_second": round(1 / statistics.median(one["wall"] for one in rounds), 1),
        }
        for part, rounds in results.items()
    }

    def over(one: str, other: str, what: str = "cpu") -> float | None:
        """How many times cheaper `other` is than `one`, at the median of the rounds."""
        if not results.get(one) or not results.get(other):
            return None
        pairs = zip(results[one], results[other], strict=True)
        return round(statistics.median(left[what] / right[what] for left, right in pairs), 3)

    result["ratios"] = {
        f"{part}_times_{peer}": {"cpu": over(peer, part), "wall": over(peer, part, "wall")}
        for part in ("processes", "threads", "turbo_processes", "turbo_threads")
        for peer in ("webdataset", "usual")
    }
    result["ratios"] |= {
        f"{part}_share_of_limit": over(limit, part)
        for part, limit in (
            ("processes", "limit"), ("threads", "limit"),
            ("turbo_processes", "turbo_limit"), ("turbo_threads", "turbo_limit"),
        )
    }  # fmt: skip
    result["ratios"]["records_times_webdataset"] = over("records_webdataset", "records")
    return result


if __name__ == "__main__":
    main()
