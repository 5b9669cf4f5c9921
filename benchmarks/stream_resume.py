"""How long until the first batch when a run goes on in the middle of an epoch, and what is read for it?

1,000 shards of 100 tiny samples; a global batch of 256 on one rank, no decoding. Pairmill loads a state that stands
at half the epoch. webdataset 1.0.2 has no such state: it skips to the same place through its shard shuffle and shuffle
buffer. Each side runs in processes of its own with everything imported, files in the page cache; what a process read
is the kernel's count (/proc/self/io), and on our side each read of the filesystem too. Pairmill is measured twice:
as it is, reading ahead, and without reading ahead, which leaves what the first batch needs and no more. Prints one
JSON object; ratios above 1 mean less than webdataset, or than the limit (1 s; one block a lane).

    python benchmarks/stream_resume.py [--shards 1000] [--samples 100] [--batch 256] [--webdataset FOLDER]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from peers import WEBDATASET, WEBDATASET_FOLDER, found

SEED, BUFFER = 1, 1000
LIMIT_S = 1.0


def resumed(folder: str, batch: int, state: dict[str, int], read_ahead_bytes: int | None) -> dict[str, Any]:
    """Go on from `state`; return seconds to the first batch, reads of the index and of tars, and bytes."""
    from infra.storage import Folder
    from shards.layout import INDEX
    from shards.stream import READ_AHEAD_BYTES, ShardStream

    reads: list[tuple[str, int]] = []

    def counted(read: Callable[..., Any]) -> Callable[..., Any]:
        def reading(folder: Folder, name: str, *how: Any) -> Any:
            came = read(folder, name, *how)
            reads.append((name, came if isinstance(came, int) else len(came)))
            return came

        return reading

    for way in ("read", "read_range", "read_into"):
        setattr(Folder, way, counted(getattr(Folder, way)))
    ahead = READ_AHEAD_BYTES if read_ahead_bytes is None else read_ahead_bytes

    def first_batch() -> list[Any]:
        stream = ShardStream(folder, global_batch_size=batch, seed=SEED, read_ahead_bytes=ahead)
        stream.load_state_dict(state)
        return next(iter(stream))

    result = timed(first_batch)
    tar = [size for name, size in list(reads) if name != INDEX]
    return result | {
        "index_bytes": sum(size for name, size in reads if name == INDEX),
        "tar_reads": len(tar),
        "tar_bytes": sum(tar),
    }


def skipped(folder: str, batch: int, samples: int) -> dict[str, Any]:
    """Skip `samples` samples with webdataset; return its version, seconds to the first batch and bytes read."""
    import webdataset as wds

    tars = sorted(map(str, Path(folder).glob("*.tar")))

    def first_batch() -> list[Any]:
        stream = wds.DataPipeline(
            wds.SimpleShardList(tars),
            wds.detshuffle(len(tars), seed=SEED),
            wds.tarfile_to_samples(),
            wds.detshuffle(BUFFER, seed=SEED),
        )
        return list(itertools.islice(stream, samples, samples + batch))

    return timed(first_batch) | {"version": wds.__version__}


def timed(first_batch: Callable[[], list[Any]]) -> dict[str, Any]:
    """Return seconds, CPU seconds, bytes read and samples of what `first_batch` gives."""
    bytes_before, started, cpu = _read_bytes(), time.monotonic(), time.process_time()
    batch = first_batch()
    wall_s, cpu_s = time.monotonic() - started, time.process_time() - cpu
    assert all(sample["jpg"] for sample in batch)
    return {"samples": len(batch), "s": wall_s, "cpu_s": cpu_s, "bytes": _read_bytes() - bytes_before}


def _read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])  # rchar


def blocks_a_lane(order: Any, step: int) -> int:
    """Return the most blocks that one lane draws on in a step."""
    (one,) = order.walk(0, step, step + 1)
    pairs = np.unique(np.stack([one.slot // order.lane_slots, one.run]), axis=1)
    return int(np.bincount(pairs[0]).max())


def in_its_own_process(side: str, *given: Any, path: Path | None = None) -> dict[str, Any]:
    """Run `side` with these arguments in a new Python and return its result."""
    env = os.environ | ({"PYTHONPATH": f"{path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"} if path else {})
    command = [sys.executable, __file__, "--side", json.dumps([side, *given])]
    answer: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=env).stdout)
    return answer


def measured(folder: str, batch: int, repeats: int, peer: Path) -> dict[str, Any]:
    """Measure both sides on one folder, ours in `repeats` processes, of which the median counts."""
    from shards.stream import ShardStream

    stream = ShardStream(folder, global_batch_size=batch, seed=SEED)
    half = stream.steps_per_epoch // 2
    state = stream.state_dict() | {"step": half}
    ours = [in_its_own_process("resumed", folder, batch, state, None) for _ in range(repeats)]
    needed = in_its_own_process("resumed", folder, batch, state, 0)
    theirs = in_its_own_process("skipped", folder, batch, half * batch, path=peer)
    seconds, most = statistics.median(one["s"] for one in ours), blocks_a_lane(stream.order, half)
    block_bytes = stream.order.block_samples * stream.index.tar_bytes / stream.index.samples
    return {
        "shards": len(stream.index.shards),
        "corpus_bytes": stream.index.tar_bytes,
        "lanes": stream.order.lanes,
        "block_samples": stream.order.block_samples,
        "pairmill": {name: round(statistics.median(one[name] for one in ours), 4) for name in ours[0]},
        "pairmill_without_read_ahead": {name: round(value, 4) for name, value in needed.items()},
        "webdataset": theirs | {"s": round(theirs["s"], 3), "cpu_s": round(theirs["cpu_s"], 3)},
        "blocks_of_the_first_batch_a_lane": most,
        "limit_over_s": round(LIMIT_S / seconds, 2),
        "webdataset_over_s": round(theirs["s"] / seconds, 1),
        "one_block_a_lane_over_tar_bytes": round(stream.order.lanes * block_bytes / needed["tar_bytes"], 2),
        "webdataset_over_bytes": round(theirs["bytes"] / needed["bytes"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=100, help="of a shard")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--webdataset", type=Path, default=WEBDATASET_FOLDER, help="where pip put webdataset 1.0.2")
    parser.add_argument("--side", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        side, *arguments = given.side
        print(json.dumps({"resumed": resumed, "skipped": skipped}[side](*arguments)))
        return
    peer = found(given.webdataset, "webdataset", WEBDATASET)
    with tempfile.TemporaryDirectory(prefix="pairmill-bench-") as name:
        from tiny_shards import tiny_shards

        folder = tiny_shards(Path(name), given.shards, given.samples)
        print(json.dumps(measured(folder.url, given.batch, given.repeats, peer), indent=2))


if __name__ == "__main__":
    main()
