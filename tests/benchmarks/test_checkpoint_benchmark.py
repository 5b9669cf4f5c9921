"""The checkpoint benchmark with a small model: it runs, and what it prints holds together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_checkpoint_pause(tmp_path: Path) -> None:
    small = ["--model", "ViT-nano", "--checkpoints", "2", "--folder", str(tmp_path)]
    command = [sys.executable, str(ROOT / "benchmarks" / "checkpoint_pause.py"), *small]
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    ran = subprocess.run(command, capture_output=True, text=True, env=env)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["bytes"] > 12 * found["parameters"]  # weights and two moments, the statistics and counts
    assert found["pause_s"] <= found["written_after_s"]
    assert found["synchronous_over_pause"] > 0
    assert not list(tmp_path.iterdir())
