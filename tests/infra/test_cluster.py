"""The bounded queue over a pool of actors that fail and die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import count
from pathlib import Path

import pytest
import ray

from infra.cluster import ClusterConfig, run_bounded, session
from infra.errors import UserError

ROOT = Path(__file__).parents[2]


class Worker:
    """Notes each start of a task in a folder, and does what the task says."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def run(self, task: str) -> str:
        (self.folder / f"{task}-{time.monotonic_ns()}").touch()
        starts = len(list(self.folder.glob(f"{task}-*")))
        if task.startswith("mistake"):
            raise UserError("photos.csv: no column 'url'")
        if task.startswith("bug"):
            raise ZeroDivisionError("of nothing")
        if task.startswith("always-dies") or (task.startswith("dies-once") and starts == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return task.upper()


class Numbered:
    """Notes its number each time it starts; the first two of number 1 die over their work."""

    def __init__(self, folder: str, number: int) -> None:
        self.folder, self.number = Path(folder), number
        (self.folder / f"{number}-{os.getpid()}").touch()

    def run(self, task: int) -> int:
        if self.number == 1 and len(list(self.folder.glob("1-*"))) <= 2:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)  # so that one worker does not do the work of both
        return self.number


@pytest.fixture(scope="module")
def local_ray() -> Iterator[int]:
    with session(ClusterConfig(cpus=2, object_store_bytes=80 * 2**20)) as cores:
        yield cores


@pytest.mark.usefixtures("local_ray")
class TestRunBounded:
    def test_every_task_has_one_outcome(self, tmp_path: Path) -> None:
        actor = ray.remote(Worker)
        tasks = [f"t{number}" for number in range(30)]
        outcomes = list(run_bounded(lambda _: actor.remote(str(tmp_path)), tasks, workers=2, retries=0))
        assert {outcome.task: outcome.value for outcome in outcomes} == {task: task.upper() for task in tasks}
        assert not any(outcome.error for outcome in outcomes)

    def test_dead_workers_tasks_are_tried_again_and_given_up_in_the_end(self, tmp_path: Path) -> None:
        actor = ray.remote(Worker)
        tasks = ["a", "dies-once-1", "b", "always-dies", "c", "dies-once-2", "d"]
        outcomes = list(run_bounded(lambda _: actor.remote(str(tmp_path)), tasks, workers=2, retries=2))
        assert sorted(outcome.task for outcome in outcomes) == sorted(tasks)
        (lost,) = [outcome for outcome in outcomes if outcome.error]
        assert lost.task == "always-dies"
        assert "no try is left" in str(lost.error)
        # The first death may be laid at the door of the task before it, whose result died with the worker.
        assert len(list(tmp_path.glob("always-dies-*"))) in (3, 4)
        assert all(outcome.value == outcome.task.upper() for outcome in outcomes if outcome is not lost)

    def test_who_replaces_a_dead_worker_gets_its_number(self, tmp_path: Path) -> None:
        actor = ray.remote(Numbered)
        started: list[str] = []
        with closing(
            run_bounded(lambda number: actor.remote(str(tmp_path), number), count(), workers=2, retries=3)
        ) as outcomes:
            for outcome in outcomes:
                started = sorted(path.name.partition("-")[0] for path in tmp_path.iterdir())
                if outcome.value == 1 or started.count("0") > 1:
                    break
        assert started == ["0", "1", "1", "1"]

    def test_errors_are_outcomes_and_keep_their_words(self, tmp_path: Path) -> None:
        actor = ray.remote(Worker)
        tasks = ["mistake", "bug", "fine"]
        outcomes = run_bounded(lambda _: actor.remote(str(tmp_path)), tasks, workers=1, retries=3)
        found = {outcome.task: outcome.error for outcome in outcomes}
        assert found["mistake"] == "photos.csv: no column 'url'"
        assert str(found["bug"]).startswith("ZeroDivisionError: of nothing")
        assert found["fine"] is None
        assert len(list(tmp_path.glob("bug-*"))) == 1

    def test_tasks_are_drawn_only_as_workers_take_them(self, tmp_path: Path) -> None:
        actor = ray.remote(Worker)
        drawn = 0

        def endless() -> Iterator[str]:
            nonlocal drawn
            while True:
                drawn += 1
                yield f"t{drawn}"

        outcomes = run_bounded(lambda _: actor.remote(str(tmp_path)), endless(), workers=2, retries=0, ahead=1)
        for done in range(1, 21):
            next(outcomes)
            assert drawn <= done + 2 * (1 + 1)
        outcomes.close()

    def test_no_tasks_need_no_worker(self) -> None:
        assert list(run_bounded(lambda _: pytest.fail("made"), [], workers=2, retries=0)) == []


@pytest.mark.usefixtures("local_ray")
def test_a_session_within_a_session_keeps_it() -> None:
    with session(ClusterConfig(cpus=1)) as cores:
        assert cores == 2
    assert ray.is_initialized()


def test_a_cluster_out_of_reach_is_named() -> None:
    script = (
        "from infra.cluster import ClusterConfig, session\nfrom infra.errors import RunError\n"
        "try:\n    with session(ClusterConfig(address='127.0.0.1:1')): pass\n"
        "except RunError as error:\n    print(error)\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "127.0.0.1:1: cannot be reached" in done.stdout
    assert len(done.stdout.splitlines()) == 1
