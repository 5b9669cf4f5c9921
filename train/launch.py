"""Starts a training run: its folder, its processes, and what becomes of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from infra.config import essence, parse
from infra.errors import RunError, UserError
from infra.lock import LOCK_NAME, exclusive
from infra.storage import Folder
from train.changes import check_same_run
from train.checkpoint import hand_over
from train.config import RunConfig
from train.data import captions, open_stream
from train.model import check_image_size, create_model
from train.models import sizes_of
from train.objectives import check_needs, create_objective
from train.tokenizer import TOKENIZER_NAME, create_tokenizer
from train.worker import CONFIG_NAME, FAILURE_VARIABLE, RESULT_NAME, run_rank

POLL_S = 0.05
_EARLY = (LOCK_NAME, TOKENIZER_NAME)
"""What a run's folder holds before its configuration: all there is of one that was interrupted so early."""
GRACE_S = 3.0
"""Seconds that the other ranks have to end by themselves once one has failed."""


Launcher = Callable[[RunConfig, Path, int], None]
"""Runs a prepared folder's ranks, so many of them, until its result is there."""


def on_this_machine(config: RunConfig, run: Path, nproc: int) -> None:
    """Run the ranks as processes here; see `Ranks.wait` for what it raises."""
    Ranks(run, nproc).wait()


def train(
    config: RunConfig,
    run: str | Path,
    nproc: int = 1,
    launcher: Launcher = on_this_machine,
    *,
    may_change: bool = False,
) -> dict[str, Any]:
    """Train in the folder `run`, going on from its newest checkpoint; a finished run is left as it is.

    Under torchrun's environment (`WORLD_SIZE` set) this process is one rank; otherwise `launcher` starts `nproc`.

    Args:
        config: the run.
        run: local folder for `config.json`, `tokenizer.json`, `log.jsonl`, `checkpoints/` and `result.json`.
        nproc: number of ranks.
        launcher: what starts them.
        may_change: a run that was begun under other values of `train.changes.CHANGEABLE` goes on under these.

    Returns:
        `steps`, `samples`, `seconds`, and the last log line's `loss`, `accuracy`, `temperature`,
        `samples_per_s` and `memory_bytes`.

    Raises:
        UserError: a batch, corpus, name or folder that does not work out, or another process on this run.
        RunError: a rank died, or the run was stopped by a signal before its end.
        KeyboardInterrupt: Ctrl-C, after a checkpoint has been written.
    """
    run = Path(run)
    if "WORLD_SIZE" in os.environ:
        if launcher is not on_this_machine:
            raise UserError("--launcher ray: this process is a rank of torchrun's already; start it without torchrun")
        return _as_rank(config, run, may_change)
    if nproc < 1:
        raise UserError(f"nproc: {nproc} processes; start at least 1")
    _check_is_a_run(Folder(run))
    with exclusive(Folder(run)):
        done = prepare(config, run, nproc, may_change=may_change)
        if done is None:
            launcher(config, run, nproc)
            done = Folder(run).read_json(RESULT_NAME)
    return dict(done)


def prepare(config: RunConfig, run: Path, world_size: int, *, may_change: bool = False) -> dict[str, Any] | None:
    """Check the configuration and write the run's folder; return the result if it is finished already.

    `may_change` as in `train`.

    Raises:
        UserError: something in the configuration does not work out, or the folder holds another run.
    """
    folder = Folder(run)
    _check_is_a_run(folder)
    if folder.exists(CONFIG_NAME):
        before = parse(folder.read_json(CONFIG_NAME), RunConfig, source=folder.path(CONFIG_NAME))
        if check_same_run(before, config, str(run), may_change=may_change) and not folder.exists(RESULT_NAME):
            hand_over(before, config)
    if folder.exists(RESULT_NAME):
        return dict(folder.read_json(RESULT_NAME))
    open_stream(config.data, 0, world_size).check_workers(config.data.workers)
    check_groups(config, world_size)
    check_needs(config.objective.name, create_objective(**config.objective.model_dump()), config.model)
    if not folder.exists(TOKENIZER_NAME):
        create_tokenizer(config.tokenizer, captions(config.data.folder, config.data.caption_limit)).save(folder)
    _check_sides(config)
    folder.write_json(CONFIG_NAME, config.model_dump(mode="json"))
    return None


def _check_is_a_run(folder: Folder) -> None:
    if folder.exists(CONFIG_NAME) or not [name for name in folder.names() + folder.folders() if name not in _EARLY]:
        return
    raise UserError(f"{folder.url}: holds something that is no training run; take a new folder")


def check_groups(config: RunConfig, world_size: int) -> None:
    """Raise UserError where groups of a batch's statistics would be cut by the ranks' shares of it."""
    model = sizes_of(config.model)
    group = model.vision.statistics_group or model.statistics_group
    local = config.data.global_batch_size // world_size
    if group and local % group:
        raise UserError(
            f"model.vision.statistics_group: {group} samples do not divide a rank's {local} "
            f"(batch {config.data.global_batch_size} over {world_size}); take a divisor of {local}"
        )


def _check_sides(config: RunConfig) -> None:
    model = create_model(config.model, device="meta")
    check_image_size(model, config.data.image_size, "data.image_size")
    if config.data.early_image_size:
        check_image_size(model, config.data.early_image_size, "data.early_image_size")


def leads() -> bool:
    """Tell whether this process speaks for the run: under torchrun rank 0 does, without it the launcher."""
    return "WORLD_SIZE" not in os.environ or int(os.environ["RANK"]) == 0


def _as_rank(config: RunConfig, run: Path, may_change: bool) -> dict[str, Any]:
    """Be one rank of torchrun's; rank 0 holds the run's folder for all of them."""
    if not leads():
        return _trained(_prepared(config, run, may_change) or run_rank(config, run), run)
    _check_is_a_run(Folder(run))
    with exclusive(Folder(run)):
        world_size = int(os.environ["WORLD_SIZE"])
        return _trained(prepare(config, run, world_size, may_change=may_change) or run_rank(config, run), run)


def _trained(result: dict[str, Any] | None, run: Path) -> dict[str, Any]:
    if result is None:
        raise RunError(f"{run}: stopped by a signal, its checkpoint is written; run the same command to go on")
    return result


def _prepared(config: RunConfig, run: Path, may_change: bool) -> dict[str, Any] | None:
    """Wait until rank 0 has written the folder; torchrun ends this rank if that one fails."""
    folder, wanted = Folder(run), essence(config)
    while not (folder.exists(CONFIG_NAME) and folder.exists(TOKENIZER_NAME)):
        time.sleep(POLL_S)
    while not folder.exists(RESULT_NAME):
        found = parse(folder.read_json(CONFIG_NAME), RunConfig, source=folder.path(CONFIG_NAME))
        if essence(found) == wanted:
            break
        if not may_change:
            raise UserError(f"{run}: holds a run of another configuration; take a new folder")
        time.sleep(POLL_S)
    return dict(folder.read_json(RESULT_NAME)) if folder.exists(RESULT_NAME) else None


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
            FAILURE_VARIABLE: str(self._failures / str(rank)),
        }
        errors = None if rank == 0 else (self._failures / f"{rank}.stderr").open("wb")
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
            rank = min(failed, key=lambda one: (self._blame(one, failed[one]), one))
            code, failure = failed[rank], self._failure(rank)
            if failure.get("kind") == "user":
                raise UserError(failure["message"])
            if failure.get("kind") == "run":
                raise RunError(f"rank {rank} of {self.nproc}: {failure['message']}")
            words = failure.get("message", f"exit code {code}")
            words = f"killed by {signal.Signals(-code).name}" if code < 0 else words
            raise RunError(f"rank {rank} of {self.nproc} died ({words}); {again}")
        if not Folder(self.run).exists(RESULT_NAME):
            if self._stop_signal == signal.SIGINT:
                raise KeyboardInterrupt
            raise RunError(f"{self.run}: stopped by a signal; {again}")

    def _blame(self, rank: int, code: int) -> int:
        """Rank causes before consequences: one whose peer was killed fails too, with a lost connection."""
        if self._failure(rank).get("kind") in ("user", "run"):
            return 0
        return 1 if code < 0 else 2

    def _failure(self, rank: int) -> dict[str, str]:
        path = self._failures / str(rank)
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
