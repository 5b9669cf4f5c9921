"""Ranks of a gloo world, forked off a test's own file run as a script, since imports take longer than they do."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist
from torch.multiprocessing import start_processes

ROOT = Path(__file__).parents[2]


def run_ranks(
    file: str, world: int, argument: str, patience_s: float, environment: Mapping[str, str] | None = None
) -> None:
    """Run `file`, which calls `become_ranks`; all ranks must end well in `patience_s`."""
    command = [sys.executable, file, str(world), argument, str(patience_s)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | dict(environment or {})
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        assert process.wait(timeout=patience_s) == 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def become_ranks(work: Callable[[str], None]) -> None:
    """Fork the ranks of the command line, which do `work` on its argument in one process group."""
    _, world, argument, patience_s = sys.argv
    # They meet in a file: a server of this process would be a thread of it, with whose locks held it may fork.
    with tempfile.TemporaryDirectory() as folder:
        arguments = (work, int(world), f"{folder}/store", argument, float(patience_s))
        start_processes(_be_rank, arguments, nprocs=int(world), start_method="fork")


def _be_rank(number: int, work: Callable[[str], None], world: int, path: str, argument: str, patience_s: float) -> None:
    # A rank that hangs tells where, before it is killed.
    faulthandler.dump_traceback_later(0.9 * patience_s, exit=True)
    dist.init_process_group("gloo", store=dist.FileStore(path, world), rank=number, world_size=world)
    work(argument)
    dist.barrier()
    dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()
