"""The take-down's benchmark at a small size: it runs, and what it prints holds together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_take_down() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "take_down.py"), "--shards", "4", "--samples-a-shard", "3"]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["removed"] == found["samples"] == found["shards"] == 4
    assert found["files_changed"] == {"raw": 12, "dedup/signatures": 4, "final": 13}
    assert found["files_not_concerned_changed"] == found["faults_after"] == 0
    assert found["copy_of_the_same_files"]["bytes"] > 0
    assert found["same_bytes_after_the_repeat"] is True
