"""What a rank that dies of something unexpected said is shown once, with its number, and kept."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from infra.errors import RunError
from train import checkpoint
from train.config import RunConfig
from train.last_words import Failure, cause, read_failure, tell
from train.launch import prepare, train

ROOT = Path(__file__).parents[2]
MakeConfig = Callable[..., RunConfig]
PATIENCE_S = 120
LAUNCH = """
import json, sys
from infra import logs
from infra.config import parse
from infra.errors import RunError
from train.config import RunConfig
from train.launch import train
logs.setup()
try:
    train(parse(json.loads(sys.argv[1]), RunConfig, source="test"), sys.argv[2], 2)
except RunError as error:
    sys.exit(f"error: {error}")
"""


def launch(config: RunConfig, run: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", LAUNCH, config.model_dump_json(), str(run)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE)


def last_words_after(number: signal.Signals, config: RunConfig, run: Path) -> str:
    """What a run of two ranks says when rank 1 is sent a signal once it has taken a step."""
    process = launch(config, run)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not ((run / "log.jsonl").exists() and (run / "log.jsonl").read_text()):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        ranks = psutil.Process(process.pid).children()
        next(one for one in ranks if one.environ().get("RANK") == "1").send_signal(number)
        return process.communicate(timeout=PATIENCE_S)[1]
    finally:
        process.kill()
        process.wait()


def test_what_all_ranks_die_of_is_shown_once(tmp_path: Path, make_config: MakeConfig) -> None:
    """A checkpoint that lacks what only an older or a younger Pairmill would: a traceback on either rank."""
    config, run = make_config(length="4 steps"), tmp_path / "run"
    train(config, run, 1)
    (run / "result.json").unlink()
    meta = Path(checkpoint.saved(run / "checkpoints")[-1].path) / "meta.json"
    content = json.loads(meta.read_text())
    del content["values"]["guard"]["seen"]
    meta.write_bytes(checkpoint.Meta.model_validate(content).signed())
    process = launch(config, run)
    try:
        _, words = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1
    assert words.count("Traceback (most recent call last)") == 1
    assert words.count("\nKeyError: 'seen'\n") == 1
    assert re.search(r"(ranks 0, 1|rank 0|rank 1) of 2: KeyError: 'seen'", words)  # one may be ended by the other
    assert words.splitlines()[-1].startswith("error: rank ")
    kept = (run / "failed-ranks.txt").read_text()
    assert kept.count("Traceback (most recent call last)") == 1
    assert 'state["seen"]' in kept


def test_a_native_fault_of_a_rank_is_shown_before_what_follows_from_it(tmp_path: Path, make_config: MakeConfig) -> None:
    """Rank 1 dies in native code, and rank 0 of the lost connection."""
    run = tmp_path / "run"
    words = last_words_after(signal.SIGSEGV, make_config(length="100000 steps"), run)
    lines = words.splitlines()
    assert words.count("rank 1 of 2: killed by SIGSEGV") == 1
    assert words.count("Fatal Python error: Segmentation fault") == 1
    assert "in main" in words
    assert "rank 1 of 2 died (killed by SIGSEGV)" in lines[-1]
    kept = (run / "failed-ranks.txt").read_text()
    assert kept.index("rank 1 of 2") < kept.index("Segmentation fault")
    if "rank 0 of 2" in kept:  # it may have waited for longer than it is given
        assert kept.index("Segmentation fault") < kept.index("rank 0 of 2")


def test_standard_error_of_a_rank_without_a_report_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is all there is of one that ended in native code by itself, or before it could import anything."""
    (tmp_path / "1").write_text('{"kind": "cra')
    (tmp_path / "1.stderr").write_bytes(b"x" * 100_000 + b"\nterminate called: \xff\n")
    found = read_failure(tmp_path, 1, 3)
    assert (found.kind, found.words) == ("", "exit code 3")
    with caplog.at_level(logging.ERROR):
        tell([found, Failure(2, 3)], tmp_path, 4)
    assert "rank 1 of 4: exit code 3" in caplog.text or "ranks 1, 2 of 4: exit code 3" in caplog.text
    assert caplog.text.count("terminate called: \ufffd") == 1
    assert "terminate called" in (tmp_path / "failed-ranks.txt").read_text()
    assert len((tmp_path / "failed-ranks.txt").read_text()) < 70_000


def test_the_first_to_fail_is_the_cause() -> None:
    """Connections of the others are lost a little later; words that a rank chose come before any."""
    lost = Failure(0, 1, "crash", "RuntimeError: Connection closed by peer [127.0.0.1]:2041", at=12.5)
    first = Failure(1, 1, "crash", "KeyError: 'a'", at=12.0)
    killed = Failure(2, -9)
    mistake = Failure(3, 2, "user", "data.folder: none", at=13.0)
    assert cause([lost, first]) is first
    assert cause([lost, first, killed]) is killed
    assert cause([lost, first, killed, mistake]) is mistake


@pytest.mark.slow
def test_a_hung_rank_is_named_before_what_follows_from_it(tmp_path: Path, make_config: MakeConfig) -> None:
    """Rank 1 is stopped, and rank 0 waits for it in vain."""
    run = tmp_path / "run"
    words = last_words_after(signal.SIGSTOP, make_config(length="100000 steps", parallel={"timeout_s": 20}), run)
    assert words.splitlines()[-1].startswith("error: rank 1 of 2 did not answer, so rank 0 ended (")


def test_last_words_of_an_earlier_start_go_once_the_run_is_well(tmp_path: Path, make_config: MakeConfig) -> None:
    run = tmp_path / "run"
    run.mkdir()
    config = make_config(length="1 steps")
    prepare(config, run, 1)
    (run / "failed-ranks.txt").write_text("rank 0 of 1: KeyError")
    train(config, run, 1)
    assert not (run / "failed-ranks.txt").exists()


def test_last_words_are_not_those_of_an_earlier_start(tmp_path: Path) -> None:
    (tmp_path / "failed-ranks.txt").write_text("rank 0 of 2: KeyError")
    tell([Failure(1, -9)], tmp_path, 2)
    assert not (tmp_path / "failed-ranks.txt").exists()


def test_a_signal_without_a_name_has_its_number() -> None:
    """A real-time one."""
    assert Failure(1, -40).words == "killed by signal 40"


def test_ranks_that_say_nothing_leave_no_file(tmp_path: Path) -> None:
    tell([Failure(1, -9)], tmp_path, 2)
    assert not (tmp_path / "failed-ranks.txt").exists()


def test_a_mistake_has_no_last_words(tmp_path: Path, make_config: MakeConfig, caplog: pytest.LogCaptureFixture) -> None:
    """One line, and nothing else."""
    config, run = make_config(checkpoint={"every": "1 steps"}, length="2 steps"), tmp_path / "run"
    train(config, run, 1)
    (run / "result.json").unlink()
    for one in checkpoint.saved(run / "checkpoints"):
        (Path(one.path) / "meta.json").write_text("{}")
    with pytest.raises(RunError, match="none of its 2 checkpoints is sound"):
        train(config, run, 2)
    assert "Traceback" not in caplog.text
    assert not (run / "failed-ranks.txt").exists()


def test_a_native_fault_deep_in_calls_keeps_its_name_and_both_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What faulthandler writes: other threads first, then the faulty one, the last call first, then all modules."""
    other = ["Thread 0x0001 (most recent call first):", *[f'  File "t.py", line {n} in wait' for n in range(50)], ""]
    calls = [f'  File "m.py", line {n} in call{n}' for n in range(90)]
    report = [
        "Fatal Python error: Segmentation fault",
        "",
        *other,
        "Current thread 0x0002:",
        *calls,
        "",
        "Extension modules: a",
    ]
    (tmp_path / "1.fault").write_text("\n".join(report))
    run = tmp_path / "run"
    run.mkdir()
    with caplog.at_level("ERROR"):
        tell([read_failure(tmp_path, 1, -signal.SIGSEGV)], run, 2)
    for part in ("Fatal Python error", "Current thread", "call0\n", "call89\n"):
        assert caplog.text.count(part) == 1
    assert len(caplog.text.splitlines()) < 40
    assert (run / "failed-ranks.txt").read_text().count("in call") == 90
