"""Does the memory of a stream stay flat over 20 epochs?

4,000 tiny samples, decoded, a global batch of 64, half an epoch read ahead: read in the process itself, then by two
loader workers, whose memory is counted too. Then samples of 29 KB, in blocks so long that they are read to buffers
which are used again: all of them, and every other one by a keep list. At the end of each epoch the anonymous memory
of all processes is added up (what they share of files depends on who else runs). Growth is from the second epoch,
when buffers are full and everything is imported, to the last; reading goes on for another after that, so that the
buffers stay full. Prints one JSON object; a ratio above 1 means that less than the limit (10 MB) was added.

    python benchmarks/stream_memory.py [--shards 40] [--samples 100] [--epochs 20] [--workers 2]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

GLOBAL_BATCH, SEED = 64, 1
LIMIT_BYTES = 10 * 2**20
PICTURE_PX = 128
POOLED = {"lanes": 8, "block_samples": 32}


def after_each_epoch(folder: str, epochs: int, workers: int, keep_every: int) -> list[int]:
    """Read `epochs` epochs; return the bytes of this process and its workers at the last batch of each.

    `keep_every`: 0 for tiny samples, 1 for pooled reads of all, n for those of every n-th.
    """
    from infra.storage import Folder
    from shards.buffers import POOLED_FROM_BYTES
    from shards.index import load
    from shards.kept import KeepList
    from shards.loader import Loader
    from shards.stream import ShardStream

    samples = load(Folder(folder)).samples
    more: dict[str, Any] = dict(POOLED) if keep_every else {}
    if keep_every > 1:
        more["keep"] = KeepList(range(0, samples, keep_every), samples)
    stream = ShardStream(folder, global_batch_size=GLOBAL_BATCH, seed=SEED, epochs=epochs + 1, decode=True, **more)
    block_bytes = stream.order.block_samples * stream.index.tar_bytes / samples
    assert (block_bytes >= POOLED_FROM_BYTES) == bool(keep_every)
    stream.read_ahead_bytes = stream.index.tar_bytes // 2
    found: list[int] = []
    for number, batch in enumerate(Loader(stream, workers=workers), 1):
        assert len(batch) == GLOBAL_BATCH
        if number % stream.steps_per_epoch == 0:
            found.append(_anonymous_bytes())
            if len(found) == epochs:
                break
    return found


def _anonymous_bytes() -> int:
    own = psutil.Process()
    statuses = [Path(f"/proc/{one.pid}/status").read_text() for one in [own, *own.children(recursive=True)]]
    return sum(int(kb) * 1024 for status in statuses for kb in re.findall(r"RssAnon:\s+(\d+) kB", status))


def measured(folder: str, epochs: int, workers: int, keep_every: int = 0) -> dict[str, Any]:
    """Read in a new process; return its memory after each epoch, and what that comes to."""
    command = [sys.executable, __file__, "--read", json.dumps([folder, epochs, workers, keep_every])]
    mb = [size / 2**20 for size in json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)]
    growth = mb[-1] - mb[1]
    return {
        "mb_after_each_epoch": [round(size, 1) for size in mb],
        "growth_mb": round(growth, 1),
        "most_mb": round(max(mb), 1),
        "limit_over_growth": round(LIMIT_BYTES / 2**20 / max(growth, 0.1), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=40)
    parser.add_argument("--samples", type=int, default=100, help="of a shard")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--read", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.read:
        print(json.dumps(after_each_epoch(*given.read)))
        return
    with tempfile.TemporaryDirectory(prefix="pairmill-bench-") as name:
        from tiny_shards import tiny_shards

        folder = tiny_shards(Path(name) / "tiny", given.shards, given.samples)
        counts = {"in_the_process": 0, "with_workers": given.workers}
        result = {what: measured(folder.url, given.epochs, workers) for what, workers in counts.items()}
        large = tiny_shards(Path(name) / "pooled", given.shards, given.samples, PICTURE_PX)
        every = {"pooled": 1, "pooled_keep_list": 2}
        result |= {what: measured(large.url, given.epochs, 0, keep) for what, keep in every.items()}
    print(json.dumps({"samples": given.shards * given.samples, "epochs": given.epochs, **result}, indent=2))


if __name__ == "__main__":
    main()
