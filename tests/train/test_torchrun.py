"""The command under torchrun: one process at a time on a run, and one result on standard output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from infra.lock import exclusive
from infra.storage import Folder

ROOT = Path(__file__).parents[2]
PATIENCE_S = 200
RUN = """
length = "2 steps"
data = {{ folder = "{folder}", global_batch_size = 16, image_size = 16 }}
tokenizer = {{ vocabulary = 320 }}
parallel = {{ precision = "float32", threads = 1 }}
[model]
embed_dim = 16
vision = {{ widths = [4, 8], depths = [1, 1], statistics_group = 4 }}
text = {{ context = 12, width = 16, layers = 1, heads = 2 }}
"""


def torchrun(toml: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "-m", "pairmill.cli", "train", str(toml), "--json"],
        env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip


def test_a_run_is_locked_and_its_result_printed_once(tmp_path: Path, corpus: Path) -> None:
    toml, run = tmp_path / "run.toml", tmp_path / "run"
    toml.write_text(RUN.format(folder=corpus))
    with exclusive(Folder(run)):
        refused = torchrun(toml)
        assert refused.returncode != 0
        assert f"process {os.getpid()} on" in refused.stderr
        assert "already working on this folder" in refused.stderr
        assert not (run / "log.jsonl").exists()
    done = torchrun(toml)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2
    again = torchrun(toml)
    assert json.loads(again.stdout) == json.loads(done.stdout)
