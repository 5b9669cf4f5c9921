"""The stream's benchmarks at a small size: they run, and what they print holds together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import webdataset as wds

ROOT = Path(__file__).parents[2]
SAMPLE_BYTES = 4096  # of a tiny shard, about


def printed(script: str, *options: object) -> dict[str, Any]:
    """Run a benchmark on this checkout and return the object that it prints."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, options)]
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    ran = subprocess.run(command, capture_output=True, text=True, env=env)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def test_order_speed() -> None:
    found = printed("order_speed.py", "--samples", 10_000_000, "--stretch", 1_000_000)
    assert found["samples"] == 10_000_000
    assert 500_000 <= found["walked"] <= 1_000_000
    assert found["permutation_bytes"] == 8 * 10_000_000
    assert 0 <= found["of_which_after_warm_up"] <= found["held_bytes"] < found["permutation_bytes"]
    assert found["cpu_us_a_sample"] > 0
    assert found["limit_over_cpu"] > 0


def test_stream_resume(tmp_path: Path) -> None:
    (tmp_path / "webdataset").symlink_to(Path(wds.__file__).parent)
    small = ("--shards", 20, "--samples", 30, "--batch", 20, "--repeats", 1)
    found = printed("stream_resume.py", *small, "--webdataset", tmp_path)
    ours, needed, theirs = found["pairmill"], found["pairmill_without_read_ahead"], found["webdataset"]
    assert theirs["version"] == wds.__version__
    assert ours["samples"] == needed["samples"] == theirs["samples"] == 20
    assert found["blocks_of_the_first_batch_a_lane"] == 1
    assert found["lanes"] == 20
    # A block that crosses a shard's end is read in two; reading ahead only adds.
    assert found["lanes"] <= needed["tar_reads"] <= 2 * found["lanes"]
    assert needed["tar_reads"] <= ours["tar_reads"]
    most = found["lanes"] * found["block_samples"] * SAMPLE_BYTES * 1.1
    assert 0 < needed["tar_bytes"] <= min(most, ours["tar_bytes"])
    assert needed["index_bytes"] + needed["tar_bytes"] <= needed["bytes"]
    # What webdataset skips it reads.
    assert theirs["bytes"] > found["corpus_bytes"] / 2 > needed["tar_bytes"]


def test_stream_memory() -> None:
    found = printed("stream_memory.py", "--shards", 4, "--samples", 50, "--epochs", 3, "--workers", 1)
    assert (found["samples"], found["epochs"]) == (200, 3)
    for way in ("in_the_process", "with_workers"):
        after = found[way]["mb_after_each_epoch"]
        assert len(after) == 3
        assert min(after) > 10
        assert found[way]["most_mb"] == max(after)
        assert abs(found[way]["growth_mb"] - (after[2] - after[1])) < 0.2
    assert min(found["with_workers"]["mb_after_each_epoch"]) > max(found["in_the_process"]["mb_after_each_epoch"])
