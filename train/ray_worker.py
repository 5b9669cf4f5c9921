"""One rank of a training run in a worker of Ray Train's."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch.distributed as dist
from ray.exceptions import RayError

from infra import logs
from infra.config import essence, parse
from infra.errors import RunError, UserError
from infra.storage import Folder
from train.config import RunConfig, written_down
from train.ray_board import Failure
from train.worker import CONFIG_NAME, run_rank

SEEN_S = 15.0
"""Seconds that a shared file system may take to show on one node what another has written."""
POLL_S = 0.1


@dataclass(frozen=True)
class Job:
    """What a worker is to do: the run's configuration as JSON, its folder, the driver's folder, and the board."""

    config: str
    run: Path
    directory: str
    board: Any

    @classmethod
    def of(cls, config: RunConfig, run: Path, board: Any) -> Job:
        """Return the job of a rank of a run that is started here."""
        return cls(json.dumps(written_down(config)), run, str(Path.cwd()), board)


def run_worker(arguments: dict[str, Any]) -> None:
    """Be one rank, in the process group that Ray Train has made; `arguments["job"]` is a `Job`.

    Raises:
        UserError: this node does not see the run's folder, or a mistake that `run_rank` finds.
        RunError: training failed.
    """
    job: Job = arguments["job"]
    rank, host = int(os.environ["RANK"]), socket.gethostname()
    logs.setup("INFO" if rank == 0 else "WARNING")
    ray.get(job.board.arrive.remote(rank, host))
    kind, message = "crash", ""
    try:
        run_rank(own_config(job), job.run, _stop_event(job.board))
    except UserError as error:
        kind, message = "user", str(error)
        raise
    except RunError as error:
        kind, message = "run", str(error)
        raise
    except BaseException as error:
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        raise
    finally:
        if message:
            ray.get(job.board.fail.remote(Failure(rank, host, kind, message)))
        # The others, who may wait for this rank, learn of its end by the lost connection.
        if dist.is_initialized():
            dist.destroy_process_group()


def own_config(job: Job, patience_s: float = SEEN_S) -> RunConfig:
    """Return the configuration, once the run's folder is seen to be the driver's.

    Raises:
        UserError: it is not, after `patience_s` seconds.
    """
    if Path(job.directory).is_dir():
        os.chdir(job.directory)  # what relative paths in the configuration count from
    config = RunConfig.model_validate_json(job.config)
    folder, deadline = Folder(job.run), time.monotonic() + patience_s
    while not (folder.exists(CONFIG_NAME) and _is_of(config, folder)):
        if time.monotonic() > deadline:
            raise UserError(
                f"--run: node {socket.gethostname()} does not see this run's {folder.path(CONFIG_NAME)}; "
                "put the run on a disk that every node has under the same path"
            )
        time.sleep(POLL_S)
    return config


def _is_of(config: RunConfig, folder: Folder) -> bool:
    found = parse(folder.read_json(CONFIG_NAME), RunConfig, source=folder.path(CONFIG_NAME))
    return essence(found) == essence(config)


def _stop_event(board: Any) -> threading.Event:
    """Return an event that is set when the board asks to stop."""
    stop = threading.Event()

    def watch() -> None:
        try:
            ray.get(board.until_stop.remote())
        except RayError:
            return  # the board goes with the driver, and then so do we
        stop.set()

    threading.Thread(target=watch, name="stop", daemon=True).start()
    return stop
