"""The command under torchrun: one process at a time on a run, one result on standard output, any world size."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from infra.config import load_toml
from infra.lock import exclusive
from infra.storage import Folder
from train import checkpoint
from train.config import RunConfig
from train.launch import train

ROOT = Path(__file__).parents[2]
PATIENCE_S = 200
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
RUN = """
length = "{steps} steps"
log = {{ every = "1 steps" }}
data = {{ folder = "{folder}", global_batch_size = 16, image_size = 16 }}
tokenizer = {{ vocabulary = 320 }}
parallel = {{ precision = "float32", threads = 1 }}
[model]
embed_dim = 16
vision = {{ widths = [4, 8], depths = [1, 1], statistics_group = 4 }}
text = {{ context = 12, width = 16, layers = 1, heads = 2 }}
"""


def command(toml: Path, run: Path, ranks: int) -> list[str]:
    """torchrun takes `--run` for an option of its own unless `--` ends them."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launcher, "-m", "--", "pairmill.cli", "train", str(toml), "--run", str(run), "--json"]


def torchrun(toml: Path, run: Path, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(toml, run, ranks), env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


def losses(run: Path) -> dict[int, float]:
    """The loss of each step, each of which is logged once."""
    log = run / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    assert len({line["step"] for line in lines}) == len(lines)
    return {line["step"]: line["loss"] for line in lines}


@pytest.mark.slow
def test_a_run_is_locked_and_its_result_printed_once(tmp_path: Path, corpus: Path) -> None:
    toml, run = tmp_path / "run.toml", tmp_path / "run"
    toml.write_text(RUN.format(steps=2, folder=corpus))
    with exclusive(Folder(run)):
        refused = torchrun(toml, run)
        assert refused.returncode != 0
        assert f"process {os.getpid()} on" in refused.stderr
        assert "already working on this folder" in refused.stderr
        assert not (run / "log.jsonl").exists()
    done = torchrun(toml, run)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2
    again = torchrun(toml, run)
    assert json.loads(again.stdout) == json.loads(done.stdout)


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_a_stopped_run_goes_on_in_another_world(tmp_path: Path, corpus: Path) -> None:
    """Two ranks are stopped; one goes on, and four: over the same batches, with the losses of two to the end."""
    toml, run, whole, steps = tmp_path / "run.toml", tmp_path / "run", tmp_path / "whole", 40
    toml.write_text(RUN.format(steps=steps, folder=corpus))
    process = subprocess.Popen(command(toml, run, 2), env=ENVIRONMENT)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while len(losses(run)) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=PATIENCE_S)
    finally:
        left = [] if process.poll() is not None else psutil.Process(process.pid).children(recursive=True)
        for one in [*left, process]:
            one.kill()
        process.wait()
    reached = max(losses(run))
    assert reached < steps, "too late to be a test: the run had ended"
    assert checkpoint.saved(run / "checkpoints")[-1].step == reached

    train(load_toml(toml, RunConfig), whole, 2)
    expected = losses(whole)
    for ranks in (1, 4):
        copy = tmp_path / f"over-{ranks}"
        shutil.copytree(run, copy)
        done = torchrun(toml, copy, ranks)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["steps"] == steps
        assert losses(copy) == pytest.approx(expected, abs=2e-3)
