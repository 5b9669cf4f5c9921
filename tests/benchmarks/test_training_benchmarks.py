"""The trainer's benchmarks at a small size: they run, and what they print holds together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def printed(script: str, *options: object) -> dict[str, Any]:
    """Run a benchmark on this checkout and return the object that it prints."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, options)]
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    ran = subprocess.run(command, capture_output=True, text=True, env=env)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell a peak")
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_loss_memory(name: str) -> None:
    """Both sides compute the same loss, and the whole matrix is in the memory of one of them alone."""
    rows, matrix = 4096, 4 * 4096**2
    sizes = ("--rows", rows, "--whole-rows", rows, "--width", 16, "--tile", 256)
    found = printed("loss_memory.py", *sizes, "--threads", 1, "--repeats", 1, "--objectives", name)[name]
    tiled, whole = found["tiled"], found["whole_small"]
    assert tiled["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    assert 0 < tiled["bytes"] < matrix / 2 < matrix < whole["bytes"] == found["whole_bytes"]
    assert found["memory_share"] == pytest.approx(tiled["bytes"] / whole["bytes"])
    assert found["time_share"] == pytest.approx(tiled["cpu_seconds"] / whole["cpu_seconds"])
    assert min(tiled["seconds"], tiled["cpu_seconds"], whole["seconds"], whole["cpu_seconds"]) > 0
