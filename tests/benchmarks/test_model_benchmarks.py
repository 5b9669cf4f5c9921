"""The models' benchmarks at a small size: they run, and what they print holds together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_open_clip_parity() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "open_clip_parity.py"), "--models", "ViT-S-32", "--batch", "2"]
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    ran = subprocess.run(command, capture_output=True, text=True, env=env)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["models"]["ViT-S-32"]["loads_strictly"]
    assert 0 < found["ratio"] <= 1
