"""A rank that stands still is named, by one that does not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from train.config import RunConfig
from train.heartbeat import STALLS_NAME
from train.launch import prepare

ROOT = Path(__file__).parents[2]
PATIENCE_S = 150
LAUNCH = """
import json, sys
from infra import logs
from infra.config import parse
from train.config import RunConfig
from train.launch import train
train(parse(json.loads(sys.argv[1]), RunConfig, source="test"), sys.argv[2], 2)
"""


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[bytes]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_is_named(tmp_path: Path, make_config: Callable[..., RunConfig], stopped: int) -> None:
    run = tmp_path / "run"
    config = make_config(length="100000 steps", log={"every": "1 steps", "stall_s": 1.5})
    prepare(config, run, 2)
    log = run / "log.jsonl"
    with (tmp_path / "said").open("wb") as said:
        command = [sys.executable, "-c", LAUNCH, config.model_dump_json(), str(run)]
        launcher = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=said)
    ranks: list[psutil.Process] = []
    try:
        wait_for(lambda: log.exists() and log.read_text().count("\n") > 3, launcher)
        ranks = psutil.Process(launcher.pid).children()
        target = next(one for one in ranks if one.environ().get("RANK") == str(stopped))
        target.send_signal(signal.SIGSTOP)

        def told() -> dict[str, Any] | None:
            # A machine that is busy may have looked like a stall before.
            text = (run / STALLS_NAME).read_text() if (run / STALLS_NAME).exists() else ""
            found = [json.loads(line) for line in text.splitlines()]
            return next((line for line in found if [one["answers"] for one in line["behind"]] == [False]), None)

        (behind,) = wait_for(told, launcher)["behind"]
        assert (behind["rank"], behind["process"]) == (stopped, target.pid)
        assert behind["where"].startswith("train/")
        steps = log.read_text().count("\n")
        target.send_signal(signal.SIGCONT)
        wait_for(lambda: log.read_text().count("\n") > steps, launcher)
    finally:
        for one in [*ranks, psutil.Process(launcher.pid)]:
            one.kill()
        launcher.wait()
    if stopped == 1:  # the log of rank 0 is the launcher's own
        words = f"behind: rank 1 (process {target.pid} on "
        assert words in " ".join((tmp_path / "said").read_text().split())
