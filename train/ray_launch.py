"""Starts a training run on a Ray cluster, and again when workers or nodes are lost.

Ray Train places the workers, makes their process group and notices who dies. What is lost is made good here, attempt by
attempt, since the next one may have to be of another size, and a mistake of the user's is not worth another.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray.exceptions import RayError

from infra.cluster import ClusterConfig, session
from infra.errors import RunError, UserError
from infra.logs import Meter, log, progress
from infra.storage import Folder
from shards.order import default_lanes
from train.config import RunConfig
from train.launch import check_groups
from train.ray_attempt import Attempt, board_here, resource, room
from train.ray_board import Failure
from train.ray_worker import POLL_S, SEEN_S
from train.sinks.jsonl import LOG_NAME, last_line
from train.worker import RESULT_NAME, STOP_SIGNALS

AGAIN = "run the same command to go on from the last checkpoint"
LOOK_EVERY_S = 1.0
WAIT_S = 5.0
"""Seconds between two looks at a cluster that has no room."""


@dataclass
class RayLauncher:
    """Starts the ranks of a run as workers of Ray Train.

    Attributes:
        cluster: where; a local Ray by default.
        max_failures: how often the run is started again after a loss; -1: always.
        min_nproc: fewest ranks to go on with where nodes are lost; 0: as many as at first.
    """

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    max_failures: int = 3
    min_nproc: int = 0

    def __call__(self, config: RunConfig, run: Path, nproc: int) -> None:
        """Train in the folder `run`, which `prepare` has written, until its result is there.

        Raises:
            UserError: a mistake, here or found by a rank.
            RunError: a rank failed or too many were lost, or SIGTERM stopped the run.
            KeyboardInterrupt: Ctrl-C stopped the run.
        """
        _check_ray_train()
        sizes = world_sizes(config, self.min_nproc or nproc, nproc)
        # Ray Train would have each worker in a folder of its own, and relative paths count from ours.
        os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
        if len(sizes) > 1:
            # After a loss the cluster may count the lost for a while; then a smaller size is to have its turn soon.
            os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "30")
        is_joined = bool(self.cluster.address or os.environ.get("RAY_ADDRESS") or ray.is_initialized())
        with _signals() as asked, session(self.cluster):
            if not is_joined and room() < sizes[0]:
                raise UserError(
                    f"--nproc: {sizes[0]} processes take as many {resource()}s and there are {room()}; "
                    "lower it, or name a cluster with --cluster.address"
                )
            with progress("train", None, "samples") as meter:
                try:
                    _Attempts(config, run.absolute(), sizes, self.max_failures, asked, meter).until_done()
                except RayError as error:  # what is beside us has gone: the head, or this node
                    words = str(error).splitlines()[0]
                    raise RunError(f"the Ray cluster is lost: {type(error).__name__}: {words}; {AGAIN}") from error


def world_sizes(config: RunConfig, least: int, most: int) -> list[int]:
    """Return the numbers of ranks from `least` to `most` that can share the batch, ascending.

    Raises:
        UserError: there is none.
    """
    batch = config.data.global_batch_size
    found = [size for size in range(least, most + 1) if _can_share(config, size)]
    if not found:
        raise UserError(f"--min-nproc: no number from {least} to {most} can share batches of {batch}; lower it")
    return found


def _can_share(config: RunConfig, size: int) -> bool:
    try:
        check_groups(config, size)
    except UserError:
        return False
    return default_lanes(config.data.global_batch_size) % size == 0


def _check_ray_train() -> None:
    try:
        import ray.train.torch  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--launcher ray: Ray Train cannot be loaded ({str(error).splitlines()[0]}); pip install 'pairmill[ray]'"
        ) from None


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect the signals that mean "save and leave" while the block runs; a second one interrupts it."""
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if len(asked) > 1:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, ask) for number in STOP_SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class _Attempts:
    """One start of Ray Train after another, until the run has its result."""

    config: RunConfig
    run: Path
    sizes: list[int]
    max_failures: int
    asked: list[int]
    meter: Meter
    failures: int = 0

    def until_done(self) -> None:
        while not Folder(self.run).exists(RESULT_NAME):
            fitting = [size for size in self.sizes if size <= room()]
            size = fitting[-1] if fitting else self.sizes[0]
            board = board_here()
            attempt = Attempt(self.config, self.run, size, board)
            try:
                attempt.start()
                self._watch(attempt, board)
                if self.asked:
                    self._raise_stopped()
                self._judge(attempt, ray.get(board.failures.remote()))
            finally:
                attempt.clear()
                with suppress(RayError):
                    ray.kill(board)

    def _watch(self, attempt: Attempt, board: Any) -> None:
        """Wait for the attempt's end; pass a signal on, and do not wait for ranks that have not started."""
        told, look = False, time.monotonic()
        while attempt.is_alive():
            attempt.join(POLL_S)
            if self.asked and not told:
                told = True
                ray.get(board.stop.remote())
                if not ray.get(board.hosts.remote()):
                    return
            if time.monotonic() >= look:
                look = time.monotonic() + LOOK_EVERY_S
                self._show()

    def _show(self) -> None:
        line = last_line(self.run / LOG_NAME)
        if {"samples", "loss", "samples_per_s"} <= line.keys() and line["samples"] != self.meter.done:
            fields = {name: line[name] for name in ("loss", "accuracy") if name in line}
            self.meter.advance(line["samples"] - self.meter.done, **fields, per_s=line["samples_per_s"])

    def _raise_stopped(self) -> None:
        if Folder(self.run).exists(RESULT_NAME):
            return
        if self.asked[0] == signal.SIGINT:
            raise KeyboardInterrupt
        raise RunError(f"{self.run}: stopped by a signal; {AGAIN}")

    def _judge(self, attempt: Attempt, failures: list[Failure]) -> None:
        """Return if the run is done, or may be started again; else raise the cause."""
        from ray.train import ControllerError, PreemptionError

        error = attempt.error
        if error is None:
            _wait_for_result(self.run)
            return
        self._raise_final(attempt, failures)
        if isinstance(error, ControllerError) and (room() < attempt.size or attempt.found_no_room()):
            log.warning(
                "train: waiting for room: %d ranks take a %s each and the cluster has %d, some may be in use",
                attempt.size, resource(), room(),
            )  # fmt: skip
            time.sleep(WAIT_S)
            return
        if isinstance(error, PreemptionError):
            log.warning("train: a node is taken away; going on from the last checkpoint")
            return
        words = attempt.words(failures)
        if 0 <= self.max_failures <= self.failures:
            raise RunError(f"{words}, after {self.failures} restarts; {AGAIN}")
        self.failures += 1
        of = f" of {self.max_failures}" if self.max_failures >= 0 else ""
        log.warning("train: %s; going on from the last checkpoint (restart %d%s)", words, self.failures, of)

    def _raise_final(self, attempt: Attempt, failures: list[Failure]) -> None:
        """Raise what would come again: a mistake, or a failure with words that no lost rank has caused."""
        for failure in failures:
            if failure.kind == "user":
                raise UserError(failure.message)
        for failure in failures:
            if failure.kind == "run" and not attempt.lost(failures):
                raise RunError(f"rank {failure.rank} of {attempt.size} on {failure.host}: {failure.message}")


def _wait_for_result(run: Path) -> None:
    deadline = time.monotonic() + SEEN_S
    while not Folder(run).exists(RESULT_NAME):
        if time.monotonic() > deadline:
            raise RunError(f"{run}: all ranks have ended and {RESULT_NAME} is not there; {AGAIN}")
        time.sleep(POLL_S)
