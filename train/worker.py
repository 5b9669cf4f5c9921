"""One rank of a training run: a process that a launcher started, ours or torchrun's."""

from __future__ import annotations

import faulthandler
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from infra import logs
from infra.config import parse
from infra.errors import RunError, UserError
from infra.storage import Folder
from train.config import RunConfig
from train.determinism import deterministic
from train.heartbeat import Heartbeat
from train.last_words import KEPT_NAME
from train.loop import fit, resumed
from train.parallel import process_group_backend, rank
from train.state import build
from train.writable import check_stream_cache

CONFIG_NAME, RESULT_NAME = "config.json", "result.json"
FAILURE_VARIABLE = "PAIRMILL_FAILURE"
"""Where our launcher expects the words of a rank that fails."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
EXIT_FAILED, EXIT_USER = 1, 2


def run_rank(config: RunConfig, run: Path, stop: threading.Event | None = None) -> dict[str, Any] | None:
    """Train as the rank that the environment names (`RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`).

    Args:
        config: the run.
        run: its folder.
        stop: ends the run early once it is set, as a signal does.

    Returns:
        The run's result, or None if a signal ended it early (its checkpoint is written).

    Raises:
        UserError: the corpus or the checkpoint does not fit the configuration.
        RunError: training failed.
    """
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(config.parallel.threads or max(1, len(os.sched_getaffinity(0)) // local_world))
    check_stream_cache(config.data)
    same = deterministic(config.parallel.deterministic)
    with same, _process_group(config.parallel.timeout_s), _stop_signals(stop) as stopped:
        # Nobody can say how long it takes to load, but who does not answer meanwhile is named.
        with Heartbeat(lambda: 0, run, config.log.stall_s, longest_s=math.inf) as beats, beats.at_length():
            state = resumed(build(config, run), run)
        result = fit(state, run, stopped.is_set)
        if rank() == 0:
            Folder(run).delete(KEPT_NAME)  # of an earlier start
        if result is not None and rank() == 0:
            Folder(run).write_json(RESULT_NAME, result)
    return result


@contextmanager
def _process_group(timeout_s: float) -> Iterator[None]:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group(process_group_backend(), timeout=timedelta(seconds=timeout_s))
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _stop_signals(stop: threading.Event | None) -> Iterator[threading.Event]:
    """Turn the signals that mean "save and leave" into an event while the block runs."""
    stop = stop or threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, ask) for number in STOP_SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_with_launcher() -> None:
    """End this process when the launcher's end of standard input closes: a killed one leaves no ranks."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(EXIT_FAILED)

    threading.Thread(target=watch, name="launcher", daemon=True).start()


def main() -> int:
    """Train one rank of the run folder given as the only argument; return the exit code."""
    _leave_with_launcher()
    faults = Path(os.environ[FAILURE_VARIABLE]).with_suffix(".fault").open("w", encoding="utf-8")
    faulthandler.enable(faults, all_threads=False)
    logs.setup("INFO" if os.environ.get("RANK", "0") == "0" else "WARNING")
    run = Path(sys.argv[1])
    try:
        config = parse(Folder(run).read_json(CONFIG_NAME), RunConfig, source=str(run / CONFIG_NAME))
        run_rank(config, run)
    except UserError as error:
        _report("user", str(error))
        return EXIT_USER
    except RunError as error:
        _report("run", str(error))
        return EXIT_FAILED
    except BaseException as error:  # noqa: BLE001 - the launcher shows it
        _report("crash", f"{type(error).__name__}: {error}".splitlines()[0])
        return EXIT_FAILED
    return 0


def _report(kind: str, message: str) -> None:
    report = {"kind": kind, "message": message, "at": time.monotonic(), "traceback": traceback.format_exc()}
    Path(os.environ[FAILURE_VARIABLE]).write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    code = main()
    # A thread stuck in a collective must not keep a rank that is done, or has failed, alive.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
