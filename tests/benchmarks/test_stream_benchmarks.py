"""The stream's benchmarks at a small size: they run, and what they print holds together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
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


def installed(folder: Path) -> Path:
    """Return a folder where the webdataset of this environment stands in for the peer's own version."""
    (folder / "webdataset").symlink_to(Path(wds.__file__).parent)
    return folder


def test_order_speed() -> None:
    found = printed("order_speed.py", "--samples", 10_000_000, "--stretch", 1_000_000)
    assert found["samples"] == 10_000_000
    assert 500_000 <= found["walked"] <= 1_000_000
    assert found["permutation_bytes"] == 8 * 10_000_000
    assert 0 <= found["of_which_after_warm_up"] <= found["held_bytes"] < found["permutation_bytes"]
    assert found["cpu_us_a_sample"] > 0
    assert found["limit_over_cpu"] > 0


def test_stream_resume(tmp_path: Path) -> None:
    small = ("--shards", 20, "--samples", 30, "--batch", 20, "--repeats", 1)
    found = printed("stream_resume.py", *small, "--webdataset", installed(tmp_path))
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
    for way in ("in_the_process", "with_workers", "pooled", "pooled_keep_list"):
        after = found[way]["mb_after_each_epoch"]
        assert len(after) == 3
        assert min(after) > 10
        assert found[way]["most_mb"] == max(after)
        assert abs(found[way]["growth_mb"] - (after[2] - after[1])) < 0.2
    assert min(found["with_workers"]["mb_after_each_epoch"]) > max(found["in_the_process"]["mb_after_each_epoch"])


def test_loader_throughput(tmp_path: Path) -> None:
    parts = ("webdataset", "processes", "limit", "records")
    small = ("--samples", 64, "--distinct", 4, "--batch", 16, "--epochs", 2, "--rounds", 1, "--parts", *parts)
    found = printed("loader_throughput.py", *small, "--webdataset", installed(tmp_path))
    assert found.keys() == {"picture_bytes", "ratios", *parts}
    assert 5_000 < found["picture_bytes"] < 60_000
    assert all(found[part]["a_second"] > 0 for part in parts)
    # Of the others, loader processes end so soon at this size that they take their CPU time along.
    assert found["limit"]["cpu_ms"] > 0
    ratios = found["ratios"]
    shown = found["processes"]["a_second"] / found["webdataset"]["a_second"]
    assert ratios["processes_times_webdataset"]["wall"] == pytest.approx(shown, rel=0.1)
    assert ratios["processes_share_of_limit"] is not None
    assert ratios["records_times_webdataset"] is ratios["threads_share_of_limit"] is None


def test_stream_s3() -> None:
    found = printed("stream_s3.py", "--samples", 64, "--epochs", 1, "--rounds", 1, "--decoders", 1, "--delay-ms", 2)
    assert 5_000 < found["bytes_a_sample"] < 60_000
    assert found["decoders"] == 1
    assert found["ratios"] == [found["ratio"]]
    shown = found["s3_samples_per_s"] / found["local_samples_per_s"]
    assert found["ratio"] == pytest.approx(shown, rel=0.1)
    assert found["s3_first_batch_s"] > 0
    assert found["cores_taken"].keys() == {"gateway", "line"}
    assert min(found["cores_taken"].values()) >= 0
