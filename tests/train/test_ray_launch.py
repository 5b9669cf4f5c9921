"""Runs on a real Ray cluster of two nodes: workers and nodes that die, signals, mistakes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

from infra.config import load_toml
from infra.errors import UserError
from train import checkpoint
from train.config import RunConfig, written_down
from train.launch import prepare, train
from train.model_config import ModelConfig
from train.models import sizes_of
from train.ray_launch import RayLauncher, world_sizes
from train.ray_worker import Job, own_config

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).parents[2]
PATIENCE_S = 400
STEPS = 60
RUN = """
length = "{steps} steps"
data = {{ folder = "{folder}", global_batch_size = 16, image_size = 16 }}
tokenizer = {{ vocabulary = 320 }}
augment = {{ rotation_degrees = 10, brightness = 0.2 }}
parallel = {{ precision = "float32", threads = 1 }}
checkpoint = {{ every = "10 steps" }}
log = {{ every = "1 steps" }}
{more}
[model]
embed_dim = 16
vision = {{ widths = [4, 8], depths = [1, 1], statistics_group = 4 }}
text = {{ context = 12, width = 16, layers = 1, heads = 2 }}
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head, where drivers run, with room for one rank."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        yield cluster
    finally:
        cluster.shutdown()


@pytest.fixture
def node(cluster: Cluster) -> Iterator[Any]:
    """A second node with room for one rank."""
    node = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield node
    for left in list(cluster.worker_nodes):
        cluster.remove_node(left, allow_graceful=False)


@pytest.fixture
def toml(tmp_path: Path, corpus: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(RUN.format(steps=STEPS, folder=corpus, more=""))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> list[dict[str, Any]]:
    """The log of a run of two ranks that our own launcher started and nothing befell."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "run.toml").write_text(RUN.format(steps=STEPS, folder=corpus, more=""))
    train(load_toml(folder / "run.toml", RunConfig), folder / "run", 2)
    return logged(folder / "run")


@contextmanager
def driver(cluster: Cluster, toml: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """The command with `--launcher ray`, in a process of its own."""
    command = [sys.executable, "-m", "pairmill.cli", "train", str(toml), "--launcher", "ray", *options, "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
    process = subprocess.Popen(
        [*command, "--cluster.address", cluster.address],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def logged(run: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    kept = ("step", "samples", "loss", "accuracy", "gradient_norm", "learning_rate", "temperature")
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in kept} for line in lines]


def wait_for_checkpoint(run: Path, process: subprocess.Popen[str]) -> None:
    wait_for(lambda: checkpoint.saved(run / "checkpoints"), process)
    assert not (run / "result.json").exists(), "too late to be a test: the run had ended"


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    """Wait until the condition holds, while the process lives."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def train_workers(node: Any) -> list[psutil.Process]:
    """Ray Train's workers on a node of the cluster."""
    (raylet,) = [one.process for one in node.all_processes["raylet"]]
    children = psutil.Process(raylet.pid).children(recursive=True)
    return [child for child in children if "RayTrainWorker" in " ".join(child.cmdline())]


@pytest.mark.slow
def test_a_killed_worker_costs_no_step(cluster: Cluster, node: Any, toml: Path, whole: list[dict[str, Any]]) -> None:
    """The run goes on from its checkpoint and ends loss by loss as one of our own launcher's, each step once."""
    run = toml.with_suffix("")
    with driver(cluster, toml, "--nproc", "2") as process:
        wait_for_checkpoint(run, process)
        (worker,) = train_workers(node)
        worker.kill()
        output, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, told
    assert json.loads(output)["steps"] == STEPS
    assert re.search(r"rank [01] of 2 died .*; going on from the last checkpoint \(restart 1 of 3\)", told), told
    assert logged(run) == whole


@pytest.mark.slow
def test_sigterm_saves_a_checkpoint_and_leaves(
    cluster: Cluster, node: Any, toml: Path, whole: list[dict[str, Any]]
) -> None:
    """One line, exit code 1; our own launcher goes on from there to the same end."""
    run = toml.with_suffix("")
    with driver(cluster, toml, "--nproc", "2") as process:
        wait_for(
            lambda: (run / "log.jsonl").exists() and len((run / "log.jsonl").read_text().splitlines()) > 2, process
        )
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1, told
    assert "stopped by a signal" in told.splitlines()[-1]
    steps = logged(run)[-1]["step"]
    assert steps < STEPS
    assert checkpoint.saved(run / "checkpoints")[-1].step == steps
    train(load_toml(toml, RunConfig), run, 2)
    assert logged(run) == whole


@pytest.mark.slow
def test_a_mistake_that_a_worker_finds_is_not_tried_again(
    cluster: Cluster, node: Any, toml: Path, corpus: Path, tmp_path: Path
) -> None:
    """One line that names it, exit code 2."""
    more = f'evaluate = {{ suite = "{tmp_path}/nothing", every = "1 steps" }}'
    toml.write_text(RUN.format(steps=STEPS, folder=corpus, more=more))
    with driver(cluster, toml, "--nproc", "2") as process:
        _, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2, told
    assert f"{tmp_path}/nothing" in told.splitlines()[-1]
    assert "going on" not in told
    assert "Traceback" not in told


@pytest.mark.slow
def test_a_lost_node_is_waited_for(cluster: Cluster, node: Any, toml: Path, whole: list[dict[str, Any]]) -> None:
    """With the node that takes its place the run goes on from its checkpoint."""
    run = toml.with_suffix("")
    with driver(cluster, toml, "--nproc", "2") as process:
        wait_for_checkpoint(run, process)
        cluster.remove_node(node, allow_graceful=False)
        time.sleep(2.0)
        cluster.add_node(num_cpus=1)
        _, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, told
    assert logged(run) == whole


@pytest.mark.slow
def test_a_lost_node_is_done_without(cluster: Cluster, node: Any, toml: Path, whole: list[dict[str, Any]]) -> None:
    """With `--min-nproc` the run goes on with the ranks there is room for, over the same batches."""
    run = toml.with_suffix("")
    with driver(cluster, toml, "--nproc", "2", "--min-nproc", "1") as process:
        wait_for_checkpoint(run, process)
        cluster.remove_node(node, allow_graceful=False)
        _, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, told
    lines = logged(run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line, other in zip(lines, whole, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], abs=2e-3)


def test_a_folder_that_a_node_does_not_see_is_named(tmp_path: Path, toml: Path) -> None:
    """Also one of the same path that holds another run."""
    config = load_toml(toml, RunConfig)
    before = Path.cwd()
    os.chdir(tmp_path)
    job = Job.of(config, tmp_path / "run", None)
    os.chdir(before)
    try:
        with pytest.raises(UserError, match=f"node {socket.gethostname()} does not see .*/run/config.json"):
            own_config(job, patience_s=0.2)
        prepare(config.model_copy(update={"length": "7 steps"}), tmp_path / "run", 1)
        with pytest.raises(UserError, match="does not see"):
            own_config(job, patience_s=0.2)
        assert Path.cwd() == tmp_path, "relative paths count from where the command was given"
    finally:
        os.chdir(before)


def test_a_rank_s_model_is_the_named_one_of_the_launcher(tmp_path: Path, toml: Path) -> None:
    """With its own temperature and bias, which the defaults of other models are not to overrule."""
    config = load_toml(toml, RunConfig).model_copy(update={"model": ModelConfig(name="SigLIP-nano")})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(written_down(config)))
    sizes = sizes_of(own_config(Job.of(config, tmp_path / "run", None), patience_s=0.2).model)
    assert (sizes.temperature, sizes.logit_bias) == (0.1, -10.0)


def test_world_sizes_share_the_batch(toml: Path) -> None:
    """Those that divide it, and whose batches the groups of the statistics divide."""
    config = load_toml(toml, RunConfig)
    assert world_sizes(config, 1, 16) == [1, 2, 4]
    with pytest.raises(UserError, match="no number from 3 to 3 can share batches of 16"):
        world_sizes(config, 3, 3)


@pytest.mark.slow
def test_more_ranks_than_room_is_named(toml: Path) -> None:
    """Where the cluster is our own and will not grow."""
    command = [sys.executable, "-m", "pairmill.cli", "train", str(toml), "--launcher", "ray", "--nproc", "2"]
    ran = subprocess.run([*command, "--cluster.cpus", "1"], capture_output=True, text=True)
    assert ran.returncode == 2, ran.stderr
    assert "--nproc: 2 processes take as many CPUs and there are 1" in " ".join(ran.stderr.split())


def test_a_rank_of_torchrun_starts_no_ranks(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="start it without torchrun"):
        train(load_toml(toml, RunConfig), toml.with_suffix(""), 2, RayLauncher())
