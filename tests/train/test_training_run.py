"""Whole runs in real processes: resume, failure, stopping, bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.errors import RunError, UserError
from train import checkpoint
from train.config import RunConfig
from train.launch import train

ROOT = Path(__file__).parents[2]
MakeConfig = Callable[..., RunConfig]
PATIENCE_S = 120
LAUNCH = """
import json, sys
from infra.config import parse
from infra.errors import RunError
from train.config import RunConfig
from train.launch import train
try:
    train(parse(json.loads(sys.argv[1]), RunConfig, source="test"), sys.argv[2], int(sys.argv[3]))
except RunError as error:
    print(error)
    sys.exit(1)
"""


def start(config: RunConfig, run: Path, nproc: int) -> subprocess.Popen[str]:
    """A run in a launcher process of its own."""
    command = [sys.executable, "-c", LAUNCH, config.model_dump_json(), str(run), str(nproc)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    """Wait until the condition holds, while the process lives."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def ranks_of(launcher: int) -> list[int]:
    """Process numbers of a launcher's ranks, in rank order."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
                rank = dict(
                    entry.split("=", 1) for entry in (folder / "environ").read_text().split("\0") if "=" in entry
                ).get("RANK")
            except (OSError, IndexError):
                continue
            if parent == launcher and rank is not None:
                found.append((int(rank), int(folder.name)))
    return [process for _, process in sorted(found)]


def weights(run: Path) -> dict[str, Any]:
    """The newest checkpoint's content."""
    state = checkpoint.load_newest(run / "checkpoints")
    assert state is not None
    return state


def logged(run: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    kept = ("step", "samples", "loss", "accuracy", "gradient_norm", "learning_rate", "temperature")
    return [{name: line[name] for name in kept} for line in lines]


def assert_same(left: Path, right: Path) -> None:
    """Same weights, averages, position and log, to the bit."""
    one, other = weights(left), weights(right)
    assert one["data"] == other["data"]
    assert one["samples"] == other["samples"]
    for table in ("model", "average"):
        assert one[table].keys() == other[table].keys()
        for name, value in one[table].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[table][name])), name
    assert logged(left) == logged(right)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """Where the uninterrupted run of two processes is put by the first test that needs it."""
    return tmp_path_factory.mktemp("whole") / "run"


def uninterrupted(whole: Path, make_config: MakeConfig) -> Path:
    """Run without interruption, once."""
    train(make_config(), whole, 2)
    return whole


def test_killed_run_resumes_to_the_same_weights(tmp_path: Path, whole: Path, make_config: MakeConfig) -> None:
    """kill -9 of the launcher: its ranks end too, and the same command ends as an uninterrupted run does."""
    config, run = make_config(), tmp_path / "run"
    launcher = start(config, run, 2)
    try:
        wait_for(lambda: checkpoint.saved(run / "checkpoints"), launcher)
        ranks = ranks_of(launcher.pid)
        assert len(ranks) == 2
        launcher.kill()
        launcher.wait()
        deadline = time.monotonic() + PATIENCE_S
        while any(Path(f"/proc/{rank}").exists() and not _is_zombie(rank) for rank in ranks):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert not (run / "result.json").exists(), "too late to be a test: the run had ended"
        result = train(config, run, 2)
    finally:
        launcher.kill()
        launcher.wait()
    assert result["steps"] == 12
    assert_same(uninterrupted(whole, make_config), run)
    assert train(config, run, 2) == result


@pytest.mark.slow
def test_signal_saves_a_checkpoint_and_leaves(tmp_path: Path, whole: Path, make_config: MakeConfig) -> None:
    """SIGTERM: a checkpoint at the step reached, exit code 1 with a line; then on to the same end."""
    config, run = make_config(checkpoint={"every": "12 steps"}), tmp_path / "run"
    launcher = start(config, run, 2)
    try:
        wait_for((run / "log.jsonl").exists, launcher)
        wait_for(lambda: (run / "log.jsonl").read_text(), launcher)
        launcher.send_signal(signal.SIGTERM)
        output, _ = launcher.communicate(timeout=PATIENCE_S)
    finally:
        launcher.kill()
        launcher.wait()
    assert launcher.returncode == 1
    assert "stopped by a signal" in output
    assert len(checkpoint.saved(run / "checkpoints")) == 1
    assert train(config, run, 2)["steps"] == 12
    assert_same(uninterrupted(whole, make_config), run)


def test_rank_that_dies_ends_the_run(tmp_path: Path, make_config: MakeConfig) -> None:
    """A killed rank is named in one line, and the other does not live on."""
    run = tmp_path / "run"
    launcher = start(make_config(length="100000 steps"), run, 2)
    try:
        wait_for(lambda: (run / "log.jsonl").exists() and (run / "log.jsonl").read_text(), launcher)
        ranks = ranks_of(launcher.pid)
        os.kill(ranks[1], signal.SIGKILL)
        output, _ = launcher.communicate(timeout=PATIENCE_S)
    finally:
        launcher.kill()
        launcher.wait()
    assert launcher.returncode == 1
    assert output.count("\n") == 1
    assert "rank 1 of 2 died (killed by SIGKILL)" in output
    assert all(not Path(f"/proc/{rank}").exists() or _is_zombie(rank) for rank in ranks)


def test_a_dead_rank_is_noticed_while_another_stands_still(tmp_path: Path, make_config: MakeConfig) -> None:
    """Rank 0, which is asked first, does not end by itself."""
    run = tmp_path / "run"
    launcher = start(make_config(length="100000 steps"), run, 2)
    ranks: list[int] = []
    try:
        wait_for(lambda: (run / "log.jsonl").exists() and (run / "log.jsonl").read_text(), launcher)
        ranks = ranks_of(launcher.pid)
        os.kill(ranks[0], signal.SIGSTOP)
        os.kill(ranks[1], signal.SIGKILL)
        output, _ = launcher.communicate(timeout=PATIENCE_S)
    finally:
        launcher.kill()
        launcher.wait()
    assert "rank 1 of 2 died (killed by SIGKILL)" in output
    assert all(not Path(f"/proc/{rank}").exists() or _is_zombie(rank) for rank in ranks)


def test_torn_checkpoint_falls_back_and_ends_the_same(
    tmp_path: Path, whole: Path, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """A damaged newest checkpoint: the one before is taken, with a warning."""
    config, run = make_config(), tmp_path / "run"
    train(config, run, 2)
    (run / "result.json").unlink()
    newest = Path(checkpoint.saved(run / "checkpoints")[-1].path) / "rank-00001.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    state = checkpoint.load_newest(run / "checkpoints")
    assert state is not None
    assert state["step"] == 8
    assert "going back to the one before" in caplog.text
    train(config, run, 2)
    assert_same(uninterrupted(whole, make_config), run)


def test_another_world_size_sees_the_same_samples(tmp_path: Path, whole: Path, make_config: MakeConfig) -> None:
    """One process instead of two: with statistics in groups, the same run up to rounding."""
    run = tmp_path / "run"
    train(make_config(), run, 1)
    alone, together = logged(run), logged(uninterrupted(whole, make_config))
    for one, two in zip(alone, together, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=2e-3)


@pytest.mark.slow
def test_torchrun_gives_the_same_run(tmp_path: Path, whole: Path, make_config: MakeConfig) -> None:
    """Under torchrun's environment each process is a rank of the same run."""
    run, script = tmp_path / "run", tmp_path / "launch.py"
    script.write_text(LAUNCH)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [str(script), make_config().model_dump_json(), str(run), "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *arguments], env=environment, check=True, timeout=PATIENCE_S, capture_output=True)
    assert_same(uninterrupted(whole, make_config), run)


@pytest.mark.parametrize(
    ("tables", "nproc", "message"),
    [
        (
            {"data": {"global_batch_size": 9}},
            2,
            r"data.global_batch_size: 9 cannot be shared evenly by 2 ranks",
        ),
        ({"data": {"global_batch_size": 128}}, 1, r"its 100 samples are fewer than one batch of 128"),
        ({"data": {"folder": ""}}, 1, r"data.folder: names no folder"),
        ({"model": {"name": "RN10-smal"}}, 1, r"did you mean 'RN10-small'"),
        ({"objective": {"name": "clop"}}, 1, r"did you mean 'clip'"),
        (
            {"model": {"vision": {"widths": [4], "depths": [1], "statistics_group": 5}}},
            2,
            r"statistics_group: 5",
        ),
        ({}, 0, r"nproc: 0"),
    ],
)
def test_mistakes_are_named_before_anything_starts(
    tmp_path: Path, make_config: MakeConfig, tables: dict[str, Any], nproc: int, message: str
) -> None:
    """Each is a UserError of one line."""
    with pytest.raises(UserError, match=message) as caught:
        train(make_config(**tables), tmp_path / "run", nproc)
    assert "\n" not in str(caught.value)


def test_empty_corpus_is_named(tmp_path: Path, make_config: MakeConfig) -> None:
    """A folder with no shards."""
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="nothing"):
        train(make_config(data={"folder": str(tmp_path / "nothing")}), tmp_path / "run", 1)


def test_another_configuration_or_folder_is_refused(tmp_path: Path, make_config: MakeConfig) -> None:
    """A run folder belongs to one configuration; any other folder is not written to."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="no training run"):
        train(make_config(), tmp_path / "other", 1)
    run = tmp_path / "run"
    train(make_config(length="2 steps"), run, 1)
    with pytest.raises(UserError, match="length: '2 steps' there, '3 steps' now"):
        train(make_config(length="3 steps"), run, 1)


def test_checkpoint_of_another_model_names_the_tensors(tmp_path: Path, make_config: MakeConfig) -> None:
    """Weights of other sizes put into a run."""
    small, large = tmp_path / "small", tmp_path / "large"
    train(make_config(length="2 steps"), small, 1)
    wide = {"text": {"context": 12, "width": 32, "layers": 1, "heads": 2}}
    train(make_config(length="2 steps", model=wide), large, 1)
    (large / "result.json").unlink()
    shutil.rmtree(large / "checkpoints")
    shutil.copytree(small / "checkpoints", large / "checkpoints")
    with pytest.raises(UserError, match=r"another model: ln_final.bias is \[16\] there, \[32\] here"):
        train(make_config(length="2 steps", model=wide), large, 1)


def test_diverged_run_names_the_samples(tmp_path: Path, make_config: MakeConfig) -> None:
    """A gradient that is not finite ends the run with the batch's keys."""
    config = make_config(optim={"learning_rate": 1e30, "clip_norm": 0.0, "warmup": "0 steps"})
    with pytest.raises(RunError, match=r"gradient is not finite .* samples on rank 0: 0"):
        train(config, tmp_path / "run", 1)


def _is_zombie(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True
