"""The processes of a run on this machine: started together, watched, ended together."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from infra.errors import RunError, UserError
from infra.storage import Folder
from train.last_words import cause, read_failure, report_path, tell
from train.worker import FAILURE_VARIABLE, RESULT_NAME

POLL_S = 0.05
NAMED_RANKS = 8
GRACE_S = 3.0
"""Seconds that the other ranks have to end by themselves once one has failed."""


class Ranks:
    """The processes of a run on this machine, and the store they meet at."""

    def __init__(self, run: Path, nproc: int) -> None:
        """Start `nproc` ranks on the run folder `run`, which `prepare` has written."""
        self.run, self.nproc = run, nproc
        self._failures = Path(tempfile.mkdtemp(prefix="pairmill-train-"))
        # The store is ours, on a port the system chose, so that no rank has to win a race for one.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._stop_signal: int | None = None
        self._processes = [self._start(rank) for rank in range(nproc)]

    def wait(self) -> None:
        """Wait for the run's end.

        Raises:
            UserError: a rank found a mistake of the user's.
            RunError: a rank died or failed (the others are ended too), or SIGTERM stopped the run.
            KeyboardInterrupt: Ctrl-C stopped the run.
        """
        try:
            with self._signals():
                # Every one is asked each time: the first may wait for one that has died.
                while None in (codes := [process.poll() for process in self._processes]) and not any(codes):
                    time.sleep(POLL_S)
                ended = self._ended_within(GRACE_S)
            self._raise_failure(ended)
        finally:
            self._kill()

    def _start(self, rank: int) -> subprocess.Popen[bytes]:
        root = str(Path(__file__).parent.parent)
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.nproc),
            "LOCAL_WORLD_SIZE": str(self.nproc),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")])),
            FAILURE_VARIABLE: str(report_path(self._failures, rank)),
        }
        # Rank 0's goes where ours goes, a terminal perhaps; the others' is shown if they die.
        errors = None if rank == 0 else report_path(self._failures, rank).with_suffix(".stderr").open("wb")
        try:
            return subprocess.Popen(
                [sys.executable, "-m", "train.worker", str(self.run)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,  # Ctrl-C reaches the ranks through us alone
            )
        finally:
            if errors is not None:
                errors.close()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def ask(number: int, frame: FrameType | None) -> None:
            # Asked a second time, the user does not want to wait for a checkpoint.
            again = self._stop_signal is not None
            self._stop_signal = number
            for process in self._processes:
                process.send_signal(signal.SIGKILL if again else signal.SIGTERM)

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before = {number: signal.signal(number, ask) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ended_within(self, grace_s: float) -> dict[int, int]:
        """Return the exit codes of ranks that ended by themselves, before the others are killed."""
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline and any(process.poll() is None for process in self._processes):
            time.sleep(POLL_S)
        codes = {rank: process.poll() for rank, process in enumerate(self._processes)}
        return {rank: code for rank, code in codes.items() if code is not None}

    def _kill(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()
        shutil.rmtree(self._failures, ignore_errors=True)

    def _raise_failure(self, ended: dict[int, int]) -> None:
        failed = {rank: code for rank, code in ended.items() if code}
        if self._stop_signal is not None and {-signal.SIGTERM, -signal.SIGKILL} & set(failed.values()):
            failed = {}  # by the signal that we passed on, before the rank could heed it
        again = "run the same command to go on from the last checkpoint"
        if failed:
            failures = [read_failure(self._failures, rank, code) for rank, code in failed.items()]
            first = cause(failures)
            if first.kind == "user":
                raise UserError(first.message)
            if first.kind == "run":
                raise RunError(f"rank {first.rank} of {self.nproc}: {first.message}")
            tell(failures, self.run, self.nproc)
            silent = sorted(set(range(self.nproc)) - set(ended)) if first.is_timeout else []
            if silent:
                who = f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent[:NAMED_RANKS]))}"
                raise RunError(
                    f"{who} of {self.nproc} did not answer, so rank {first.rank} ended ({first.words}); {again}"
                )
            raise RunError(f"rank {first.rank} of {self.nproc} died ({first.words}); {again}")
        if not Folder(self.run).exists(RESULT_NAME):
            if self._stop_signal == signal.SIGINT:
                raise KeyboardInterrupt
            raise RunError(f"{self.run}: stopped by a signal; {again}")
