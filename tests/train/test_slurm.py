"""The batch script for Slurm, run by bash with a real torchrun; programs of one node stand in for srun and scontrol."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from train import checkpoint

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "infra" / "slurm" / "train.sbatch"
PATIENCE_S = 250
JOB = 4711
RUN = """
length = "{steps} steps"
data = {{ folder = "{folder}", global_batch_size = 16, image_size = 16 }}
tokenizer = {{ vocabulary = 320 }}
parallel = {{ precision = "float32", threads = 1 }}
checkpoint = {{ every = "1000 steps" }}
log = {{ every = "1 steps" }}
[model]
embed_dim = 16
vision = {{ widths = [4, 8], depths = [1, 1], statistics_group = 4 }}
text = {{ context = 12, width = 16, layers = 1, heads = 2 }}
"""
# As Slurm's, it becomes the task here, so that what it is sent reaches the task.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
[[ "$1 $2" == "show hostnames" ]] && { echo "$3"; exit; }
echo "$@" >> "$SCONTROL_LOG"
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """What a job of one node finds in its environment."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)
    return os.environ | {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
        "SLURM_JOB_ID": str(JOB), "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "localhost",
        "SLURM_SUBMIT_DIR": str(tmp_path), "SCONTROL_LOG": str(tmp_path / "scontrol.log"),
        "PAIRMILL_VENV": str(Path(sys.executable).parents[1]), "RANKS_PER_NODE": "2",
    }  # fmt: skip


@contextmanager
def batch_job(environment: dict[str, str], *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The script as the batch shell runs it; nothing of it outlives the block."""
    process = subprocess.Popen(
        ["bash", str(SCRIPT), *arguments], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        yield process
    finally:
        left = [] if process.poll() is not None else psutil.Process(process.pid).children(recursive=True)
        for one in [*left, process]:
            one.kill()
        process.wait()


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    """Wait until the condition holds, while the process lives."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def steps(run: Path) -> list[int]:
    log = run / "log.jsonl"
    return [json.loads(line)["step"] for line in log.read_text().splitlines()] if log.exists() else []


def test_bash_reads_the_script() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    text = SCRIPT.read_text()
    directives = [line.split()[1] for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {"--signal=B:USR1@300", "--requeue", "--open-mode=append", "--ntasks-per-node=1"} <= set(directives)
    assert text.index("#SBATCH --output") < text.index("set -u"), "Slurm reads no directive after the first command"


@pytest.mark.slow
def test_a_job_near_its_time_limit_saves_and_is_queued_again(
    tmp_path: Path, slurm: dict[str, str], corpus: Path
) -> None:
    """SIGUSR1 to the batch shell: a checkpoint at the step reached; the same job then ends the run."""
    toml, run = tmp_path / "run.toml", tmp_path / "run"
    toml.write_text(RUN.format(steps=60, folder=corpus))
    with batch_job(slurm, str(toml), str(run)) as job:
        wait_for(lambda: len(steps(run)) > 2, job)
        job.send_signal(signal.SIGUSR1)
        told, _ = job.communicate(timeout=PATIENCE_S)
    reached = steps(run)[-1]
    assert reached < 60, "too late to be a test: the run had ended"
    assert [one.step for one in checkpoint.saved(run / "checkpoints")] == [reached]
    assert job.returncode != 0
    assert "asked to leave" in told
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {JOB}\n"

    with batch_job(slurm | {"SLURM_RESTART_COUNT": "1"}, str(toml), str(run)) as job:
        told, _ = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 0, told
    assert steps(run) == list(range(1, 61))
    assert json.loads((run / "result.json").read_text())["steps"] == 60
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {JOB}\n"


def test_a_mistake_is_not_queued_again(tmp_path: Path, slurm: dict[str, str]) -> None:
    (tmp_path / "run.toml").write_text("lenght = '1 steps'\n")
    with batch_job(slurm, str(tmp_path / "run.toml"), str(tmp_path / "run")) as job:
        told, _ = job.communicate(timeout=PATIENCE_S)
    assert job.returncode != 0
    assert "did you mean 'length'" in told
    assert not (tmp_path / "scontrol.log").exists()
