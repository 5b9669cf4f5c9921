"""The Ray session, and a bounded queue of work over a pool of actors that survives their deaths."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from infra.config import Config, knob
from infra.errors import NoSpaceError, RunError, UserError
from infra.logs import log

REACH_S = 5.0
"""Seconds that a cluster may take to open its port, one that starts at the same time as we do for instance."""
SOURCE_ROOT = Path(__file__).resolve().parent.parent


class ClusterConfig(Config):
    """Where the work runs."""

    address: str | None = knob(
        None,
        "Ray cluster to join ('auto', 'HOST:6379' or 'ray://HOST:10001'); without one a local Ray is started",
    )
    cpus: int | None = knob(None, "CPU cores the local Ray may use; all by default", ge=1)
    object_store_bytes: int = knob(
        256 * 2**20,
        "memory of the local Ray's object store, in bytes; shards never pass through it",
        ge=80 * 2**20,
    )
    ship_source: bool = knob(
        False, "send this source tree to the cluster, for nodes whose image does not hold Pairmill"
    )
    retries: int = knob(3, "how often a task is tried again after its worker or node died", ge=0)


@contextmanager
def session(config: ClusterConfig) -> Iterator[int]:
    """Join or start Ray for the length of the block; yields the number of CPU cores it has.

    Inside a process that is connected already (a submitted job, a test) that connection is used and kept.

    Raises:
        RunError: the cluster cannot be reached.
    """
    if ray.is_initialized():
        yield _cores()
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # What failed is an outcome; of tasks that are given up with a run nobody waits for the traceback.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": True,
    }
    address = config.address or os.environ.get("RAY_ADDRESS")
    if address:
        _check_reachable(address)
        options["address"] = address
        if config.ship_source:
            options["runtime_env"] = {
                "working_dir": str(SOURCE_ROOT),
                "excludes": [".venv", ".git", "tests", "docs"],
            }
    else:
        options |= {
            "address": "local",  # and not one that happens to run here
            "num_cpus": config.cpus or os.cpu_count(),
            "object_store_memory": config.object_store_bytes,
            "include_dashboard": False,
        }
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
        if callable(on_sigterm) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray has put its own in the place of the command line's
    except Exception as error:  # a start that fails is a bare Exception of Ray's
        what = "cannot be reached" if address else "does not start"
        raise RunError(f"Ray cluster {address or '(local)'}: {what}: {' '.join(str(error).split())}") from error
    try:
        # Ray prints what befalls its nodes on standard output, which belongs to results.
        with contextlib.redirect_stdout(sys.stderr):
            yield _cores()
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Wait until something listens at `HOST:PORT`, for a moment; Ray itself would wait for a minute and more."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return
    until = time.monotonic() + REACH_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise RunError(
                    f"Ray cluster {address}: cannot be reached: {error.strerror or error}; "
                    "start it with `ray start --head`, or name another address"
                ) from None
        time.sleep(0.2)


def _cores() -> int:
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def end_actor() -> None:
    """End the actor that this is called in; what it had in hand goes to the one in its place. Nothing elsewhere."""
    if ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None:
        ray.actor.exit_actor()


TaskT = TypeVar("TaskT")


@dataclass
class Outcome(Generic[TaskT]):
    """What became of one task: its `value`, or the `error` that it ended with (one line), never both.

    `no_space` tells that the error is a full disk, on which no other task would fare better; `mistake`, that it is one
    of the user's (`UserError`).
    """

    task: TaskT
    value: Any = None
    error: str | None = None
    no_space: bool = False
    mistake: bool = False


@dataclass
class _Attempt(Generic[TaskT]):
    task: TaskT
    left: int
    alone: bool = False
    """Was in a dead actor's hands: no other task is put behind it, so that a next death has one suspect."""


@dataclass
class _Seat(Generic[TaskT]):
    """One actor of the pool and the attempts it has in hand, oldest first.

    It gets none before it has started: after the loss of a node the cluster may have no room for it.
    """

    number: int
    make_actor: Callable[[int], Any]
    actor: Any = None
    starting: Any = None
    pending: dict[Any, _Attempt[TaskT]] = field(default_factory=dict)

    def occupy(self) -> None:
        """Put a new actor in this place."""
        self.actor = self.make_actor(self.number)
        self.starting = self.actor.__ray_ready__.remote()


def run_bounded(
    make_actor: Callable[[int], Any],
    tasks: Iterable[TaskT],
    *,
    workers: int,
    retries: int,
    ahead: int = 1,
) -> Generator[Outcome[TaskT], None, None]:
    """Run every task through `actor.run.remote(task)` on `workers` actors; yield outcomes as they come.

    `make_actor` takes the number of the actor's place, 0 to `workers - 1`; who replaces a dead actor gets its number.
    At most `workers * (1 + ahead)` tasks are handed out at a time, so the driver's memory does not grow with
    the number of tasks. A task whose actor or node died is tried again, `retries` times, on a new actor. An
    exception raised by the task itself is its outcome at once; `UserError` and `RunError` keep their words.

    Whoever leaves before the last outcome should close the iterator: the actors work on until then.
    """
    waiting = iter(tasks)
    again: deque[_Attempt[TaskT]] = deque()
    seats: list[_Seat[TaskT]] = []

    def are_left() -> bool:
        if not again:
            again.extend(_Attempt(task, retries) for task in itertools.islice(waiting, 1))
        return bool(again)

    def fill(seat: _Seat[TaskT]) -> None:
        while len(seat.pending) <= ahead and not any(attempt.alone for attempt in seat.pending.values()):
            if seat.starting is not None or not are_left() or (again[0].alone and seat.pending):
                return
            attempt = again.popleft()
            seat.pending[seat.actor.run.remote(attempt.task)] = attempt

    try:
        for number in range(workers if are_left() else 0):
            seat: _Seat[TaskT] = _Seat(number, make_actor)
            seat.occupy()
            seats.append(seat)
        while any(seat.pending for seat in seats) or are_left():
            by_ref = {
                ref: seat for seat in seats for ref in (seat.pending if seat.starting is None else [seat.starting])
            }
            (ref,), _ = ray.wait(list(by_ref), num_returns=1)
            seat = by_ref[ref]
            started = seat.starting is not None
            outcomes = _started(seat, again) if started else _collect(seat, ref, again)
            for other in seats:
                fill(other)
            yield from outcomes
    finally:
        # After the session's end its actors are gone, and to ask Ray for anything would start another one.
        for seat in seats if ray.is_initialized() else []:
            with contextlib.suppress(RayError):
                ray.kill(seat.actor)


def _started(seat: _Seat[TaskT], again: deque[_Attempt[TaskT]]) -> list[Outcome[TaskT]]:
    """Take note that a seat's actor has started; if it did not, the next task loses a try."""
    try:
        ray.get(seat.starting)
        seat.starting = None
        return []
    except (RayActorError, RayTaskError) as error:
        why = " ".join(str(error).split())[-500:]
    seat.occupy()
    if not again:
        return []
    attempt = again.popleft()
    if attempt.left > 0:
        log.warning("a worker did not start; trying again (%d left)", attempt.left)
        again.appendleft(_Attempt(attempt.task, attempt.left - 1, attempt.alone))
        return []
    return [Outcome(attempt.task, error=f"its worker does not start: {why}")]


def _collect(seat: _Seat[TaskT], ref: Any, again: deque[_Attempt[TaskT]]) -> list[Outcome[TaskT]]:
    """Take a finished reference off its seat; if the actor died, all of them, for another to try again."""
    try:
        return [_outcome(seat.pending[ref], ref)]
    except RayActorError as error:
        return _reseat(seat, again, error)
    finally:
        seat.pending.pop(ref, None)


def _outcome(attempt: _Attempt[TaskT], ref: Any) -> Outcome[TaskT]:
    """Return what became of an attempt that is over. Raises RayActorError if its actor died first."""
    try:
        return Outcome(attempt.task, value=ray.get(ref))
    except RayTaskError as error:
        no_space, mistake = (isinstance(error.cause, kind) for kind in (NoSpaceError, UserError))
        return Outcome(attempt.task, error=_one_line(error), no_space=no_space, mistake=mistake)


def _reseat(
    seat: _Seat[TaskT],
    again: deque[_Attempt[TaskT]],
    error: RayActorError,
) -> list[Outcome[TaskT]]:
    """Put a new actor in a dead one's place; the oldest attempt it had not ended loses a try."""
    outcomes: list[Outcome[TaskT]] = []
    unfinished: list[_Attempt[TaskT]] = []
    for ref, attempt in seat.pending.items():
        over, _ = ray.wait([ref], timeout=0)
        try:
            # What it had ended before its death counts, though the news of the death may come first.
            outcomes += [_outcome(attempt, ref)] if over else []
            unfinished += [] if over else [attempt]
        except RayActorError:
            unfinished.append(attempt)
    seat.pending.clear()
    seat.occupy()
    for running in unfinished[:1]:
        if running.left > 0:
            log.warning("a worker died at work on %s; trying it again (%d left)", running.task, running.left)
            again.appendleft(_Attempt(running.task, running.left - 1, alone=True))
        else:
            outcomes.append(Outcome(running.task, error=f"its worker died and no try is left: {error}"))
    again.extend(_Attempt(attempt.task, attempt.left, alone=True) for attempt in unfinished[1:])
    return outcomes


def _one_line(error: RayTaskError) -> str:
    cause = error.cause if error.cause is not None else error
    text = " ".join(str(cause).split())
    return text if isinstance(cause, UserError | RunError) else f"{type(cause).__name__}: {text[-500:]}"
