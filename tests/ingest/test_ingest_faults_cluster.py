"""What befalls a cluster: a node that dies, a store that is away, a host that is told to stop, a web that is gone."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster

from infra.storage import Folder
from ingest.config import IngestConfig, PlanConfig
from ingest.plan import plan
from ingest.worker import ShardWorker
from pairmill.sample_web.process import SampleWeb
from pairmill.sample_web.rows import write_rows
from shards.verify import verify
from shards.writer import committed

ROWS, ROWS_PER_SHARD = 90, 10
DRIVER = """
import sys
from infra.cluster import ClusterConfig
from ingest.config import IngestConfig
from ingest.run import ingest
from pairmill.cli import leave
import infra.logs, signal
from infra.errors import RunError
infra.logs.setup()
try:
    print(ingest(sys.argv[1], IngestConfig.model_validate_json(sys.argv[2]), ClusterConfig(address=sys.argv[3] or None, cpus=None if sys.argv[3] else 2)))
except RunError as error:
    leave(1, str(error))
"""  # noqa: E501


@pytest.fixture
def planned(tmp_path: Path, web: SampleWeb) -> Path:
    web.reset()
    kinds = ["error_once", "not_found", "redirect", "cmyk", "noai"]
    rows = write_rows(tmp_path / "rows", web.base_urls, limit=ROWS, share=0.3, kinds=kinds)
    plan(str(tmp_path / "corpus"), PlanConfig(urls=str(rows.urls), rows_per_shard=ROWS_PER_SHARD))
    return tmp_path / "corpus"


@pytest.fixture
def slow(config: IngestConfig) -> IngestConfig:
    """Slow enough to be in the midst of shards when something befalls them."""
    fetch = config.fetch.model_copy(update={"per_host_per_s": 10.0})
    return config.model_copy(update={"fetch": fetch, "shards_at_once": 1})


def undisturbed(planned: Path, config: IngestConfig, web: SampleWeb) -> dict[str, bytes]:
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
    return {path.name: path.read_bytes() for path in sorted((copy / "raw").glob("*.tar"))}


def start(corpus: str, config: IngestConfig, address: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", DRIVER, corpus, config.model_dump_json(), address]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_shards(corpus: Folder, count: int, driver: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 100
    while len(committed(corpus / "raw")) < count:
        assert time.monotonic() < until, "no shard in time"
        assert driver.poll() is None, driver.stderr and driver.stderr.read()
        time.sleep(0.05)


def assert_whole(corpus: Folder, expected: dict[str, bytes]) -> None:
    raw = corpus / "raw"
    assert {f"{name}.tar": raw.read(f"{name}.tar") for name in committed(raw)} == expected
    assert verify(raw.url).faults == []
    manifest = corpus.read_json("corpus.json")
    totals = manifest["stages"]["raw"]["totals"]
    assert sum(totals["by_status"].values()) == totals["rows_in"] == manifest["stages"]["plan"]["totals"]["rows_out"]
    if raw.is_local:
        assert not list(Path(raw.url).glob(".*"))


@pytest.fixture
def two_nodes() -> Iterator[tuple[Cluster, Any]]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        other = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        yield cluster, other
    finally:
        cluster.shutdown()


@pytest.mark.slow
def test_a_node_is_killed(planned: Path, slow: IngestConfig, web: SampleWeb, two_nodes: tuple[Cluster, Any]) -> None:
    expected = undisturbed(planned, slow, web)
    cluster, other = two_nodes
    driver = start(str(planned), slow, cluster.address)
    try:
        wait_for_shards(Folder(planned), 1, driver)
        cluster.remove_node(other, allow_graceful=False)
        _, told = driver.communicate(timeout=150)
    finally:
        driver.kill()
    assert driver.returncode == 0, told
    assert "a worker died" in told
    assert_whole(Folder(planned), expected)


@pytest.mark.slow
def test_the_object_store_refuses_writes_for_a_while(
    planned: Path, slow: IngestConfig, web: SampleWeb, s3_gateway: Any
) -> None:
    expected = undisturbed(planned, slow, web)
    corpus = Folder(s3_gateway.url("ingest-outage"))
    for path in [planned / "corpus.json", *sorted((planned / "plan").iterdir())]:
        corpus.write(str(path.relative_to(planned)), path.read_bytes())
    driver = start(corpus.url, slow)
    try:
        wait_for_shards(corpus, 1, driver)
        s3_gateway.stop()
        time.sleep(8.0)
        s3_gateway.start()
        _, told = driver.communicate(timeout=200)
    finally:
        driver.kill()
        if s3_gateway.process is None:
            s3_gateway.start()
    assert driver.returncode == 0, told
    assert_whole(corpus, expected)


@pytest.mark.slow
def test_a_host_that_is_told_to_stop_ends_in_its_grace_period(
    planned: Path, config: IngestConfig, web: SampleWeb
) -> None:
    """As a spot instance is reclaimed: SIGTERM to the command, and the same command on another day."""
    expected = undisturbed(planned, config, web)
    command = [
        sys.executable,
        "-m",
        "pairmill.cli",
        "ingest",
        str(planned),
        "--cluster.cpus",
        "2",
        "--image.size",
        "64",
    ]
    near = ["--fetch.allow-private", "--fetch.backoff-s", "0.05", "--workers", "2", "--fetch.per-host-in-flight", "64"]
    slowly = [*command, *near, "--fetch.per-host-per-s", "10", "--shards-at-once", "1"]
    caps = ["--fetch.max-wire-bytes", "2000000", "--fetch.max-body-bytes", "4000000"]
    first = subprocess.Popen([*slowly, *caps], stderr=subprocess.PIPE, text=True)
    try:
        wait_for_shards(Folder(planned), 1, first)
        first.send_signal(signal.SIGTERM)
        _, told = first.communicate(timeout=30)
    finally:
        first.kill()
    assert first.returncode == 1
    assert "run the same command again" in told.strip().splitlines()[-1]
    assert not list((planned / "raw").glob(".*"))
    assert 0 < len(committed(Folder(planned) / "raw")) < len(expected)
    web.reset()
    again = subprocess.run([*command, *near, *caps], capture_output=True, text=True, check=False, timeout=120)
    assert again.returncode == 0, again.stderr
    assert_whole(Folder(planned), expected)


@pytest.mark.slow
def test_the_web_goes_away_for_twenty_seconds(planned: Path, config: IngestConfig, web: SampleWeb) -> None:
    """With the breaker, rests and pauses as they are by default, and five tries: the rows wait, none is lost."""
    config = config.model_copy(update={"fetch": config.fetch.model_copy(update={"per_host_per_s": 6.0})})
    expected = undisturbed(planned, config, web)
    defaults = {name: field.default for name, field in type(config.fetch).model_fields.items()}
    names = ("backoff_s", "backoff_cap_s", "breaker_failures", "breaker_rest_s", "breaker_rests")
    patient = config.fetch.model_copy(update={"retries": 5} | {name: defaults[name] for name in names})
    worker = ShardWorker(str(planned), config.model_copy(update={"fetch": patient}))
    away = threading.Timer(2.0, web.pause, (20.0,))
    away.start()
    try:
        with ThreadPoolExecutor(2) as shards:
            list(shards.map(worker.run, range(len(expected))))
    finally:
        worker.close()
        away.join()
    raw = planned / "raw"
    rows = [row for path in sorted(raw.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert [(row["url"], row["reason"], row["detail"], row["attempts"]) for row in rows if row["transient"]] == []
    assert {path.name: path.read_bytes() for path in sorted(raw.glob("*.tar"))} == expected
    assert verify(str(raw)).faults == []
    assert sum(json.loads(path.read_text())["count"] for path in raw.glob("*_stats.json")) == len(rows)
