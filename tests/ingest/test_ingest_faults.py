"""What is killed, full or away for a while: the outcome is the same to the byte, and nothing is left lying about."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra.cluster import ClusterConfig
from ingest.config import IngestConfig, PlanConfig
from ingest.plan import plan
from ingest.run import ingest
from ingest.worker import ShardWorker
from pairmill.sample_web.process import SampleWeb
from pairmill.sample_web.rows import write_rows
from tests.mounts import needs_mount

DRIVER = """
import sys
from infra.cluster import ClusterConfig
from infra.errors import RunError
from ingest.config import IngestConfig
from ingest.run import ingest
try:
    ingest(sys.argv[1], IngestConfig.model_validate_json(sys.argv[2]), ClusterConfig(cpus=2))
except RunError as error:
    print(error, file=sys.stderr)
    sys.exit(1)
"""
MARK = "PAIRMILL_TEST_MARK"


@pytest.fixture
def planned(tmp_path: Path, web: SampleWeb) -> Path:
    """A corpus of twelve parts with a few odd rows among the good ones, planned."""
    web.reset()
    kinds = ["error_once", "not_found", "redirect", "cmyk", "noai", "truncated_image"]
    rows = write_rows(tmp_path / "rows", web.base_urls, limit=100, share=0.3, kinds=kinds)
    plan(str(tmp_path / "corpus"), PlanConfig(urls=str(rows.urls), rows_per_shard=10))
    return tmp_path / "corpus"


@pytest.fixture
def mark() -> Iterator[str]:
    """A word in the environment of what a test starts; all that carries it ends with the test."""
    word = secrets.token_hex(8)
    yield word
    for process in marked(word):
        process.kill()
    wait_until(lambda: not marked(word))


def marked(word: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == word and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_until(holds: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def raw_files(corpus: Path, suffix: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((corpus / "raw").glob(f"*{suffix}"))}


def undisturbed(planned: Path, config: IngestConfig, web: SampleWeb) -> dict[str, bytes]:
    """The tars of a run in which nothing goes wrong, made in this process from a copy of the plan."""
    copy = planned.with_name("undisturbed")
    shutil.copytree(planned, copy)
    web.reset()
    worker = ShardWorker(str(copy), config)
    try:
        for part in range(len(list((copy / "plan").glob("part-*")))):
            worker.run(part)
    finally:
        worker.close()
    web.reset()
    return raw_files(copy, ".tar")


def slowed(config: IngestConfig) -> IngestConfig:
    fetch = config.fetch.model_copy(update={"per_host_per_s": 15.0})
    return config.model_copy(update={"fetch": fetch, "shards_at_once": 1})


def assert_clean(planned: Path, totals: dict[str, Any], expected: dict[str, bytes]) -> None:
    assert raw_files(planned, ".tar") == expected
    parts = len(list((planned / "plan").glob("part-*")))
    assert totals["shards"] == parts == len(expected)
    assert sum(totals["by_status"].values()) == totals["rows_in"]
    assert not [path for path in (planned / "raw").iterdir() if path.name.startswith(".")]


def start(corpus: Path, config: IngestConfig, mark: str, *wrap: str) -> subprocess.Popen[str]:
    command = [*wrap, sys.executable, "-c", DRIVER, str(corpus), config.model_dump_json()]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, MARK: mark})


def test_the_driver_is_killed(
    planned: Path, config: IngestConfig, web: SampleWeb, mark: str, local_ray: ClusterConfig
) -> None:
    expected = undisturbed(planned, config, web)
    driver = start(planned, slowed(config), mark)
    try:
        wait_until(lambda: len(raw_files(planned, "_stats.json")) >= 2 or driver.poll() is not None)
    finally:
        driver.send_signal(signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL
    wait_until(lambda: not marked(mark))
    left = len(expected) - len(raw_files(planned, "_stats.json"))
    assert left > 0
    assert_clean(planned, ingest(str(planned), config, local_ray), expected)


def test_workers_are_killed(planned: Path, config: IngestConfig, web: SampleWeb, local_ray: ClusterConfig) -> None:
    expected = undisturbed(planned, config, web)
    totals: list[dict[str, Any]] = []
    running = threading.Thread(
        target=lambda: totals.append(ingest(str(planned), slowed(config), local_ray)), daemon=True
    )
    running.start()
    for shards in (1, 4):
        wait_until(lambda shards=shards: len(raw_files(planned, "_stats.json")) >= shards and shard_workers())
        shard_workers()[0].kill()
    running.join(120)
    assert_clean(planned, totals[0], expected)


def shard_workers() -> list[psutil.Process]:
    """Worker processes of this process' Ray."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any("ShardWorker" in word for word in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_the_web_goes_away_for_a_moment(planned: Path, config: IngestConfig, web: SampleWeb) -> None:
    expected = undisturbed(planned, config, web)
    patient = config.fetch.model_copy(
        update={"retries": 6, "retry_budget": 6.0, "backoff_s": 0.3, "backoff_cap_s": 2.0}
    )
    web.pause(1.0)
    worker = ShardWorker(str(planned), config.model_copy(update={"fetch": patient}))
    try:
        for part in range(len(expected)):
            worker.run(part)
    finally:
        worker.close()
    assert raw_files(planned, ".tar") == expected


@needs_mount
@pytest.mark.slow
def test_the_disk_is_full(planned: Path, config: IngestConfig, web: SampleWeb, mark: str, tmp_path: Path) -> None:
    """In a mount namespace of its own: a disk of 200 KB, then, with the same command, one that is large enough."""
    expected = undisturbed(planned, config, web)
    disk = planned / "raw"
    disk.mkdir()
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    script = (
        f"mount -t tmpfs -o size=200k tmpfs {disk} || exit 9; "
        f'"$1" {driver} {planned} "$2" 2> {tmp_path}/first; echo $? >> {tmp_path}/first; '
        f"ls -a {disk} | grep -c tmp- > {tmp_path}/torn; "
        f"mount -o remount,size=100m {disk} || exit 9; "
        f'"$1" {driver} {planned} "$2" 2> {tmp_path}/second; echo $? >> {tmp_path}/second; '
        f"cp -r {disk} {tmp_path}/result"
    )
    command = ["unshare", "-rm", "sh", "-c", script, "sh", sys.executable, config.model_dump_json()]
    subprocess.run(command, check=True, env={**os.environ, MARK: mark, "PYTHONPATH": str(Path.cwd())}, timeout=200)
    *log, code = (tmp_path / "first").read_text().split("\n")[:-1]
    assert code == "1"
    assert len(log) == 1, log
    assert "the disk is full" in log[0]
    assert (tmp_path / "torn").read_text().strip() == "0"
    assert (tmp_path / "second").read_text().strip().endswith("0")
    found = {path.name: path.read_bytes() for path in sorted((tmp_path / "result").glob("*.tar"))}
    assert found == expected
    assert json.loads((planned / "corpus.json").read_text())["stages"]["raw"]["done"]
