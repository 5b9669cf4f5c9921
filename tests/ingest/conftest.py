"""A running sample web, and configurations that suit one that is near."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray

from infra.cluster import ClusterConfig, session
from ingest.config import FetchConfig, ImageConfig, IngestConfig
from pairmill.sample_web.process import SampleWeb, loopback_hosts

NEAR: dict[str, Any] = {
    "allow_private": True,
    "connect_s": 2.0,
    "first_byte_s": 1.5,
    "total_s": 4.0,
    "min_bytes_per_s": 500.0,
    "slow_grace_s": 1.0,
    "retries": 2,
    "backoff_s": 0.05,
    "backoff_cap_s": 0.5,
    "retry_after_cap_s": 3.0,
    "breaker_rest_s": 0.5,
    "per_host_in_flight": 64,
    "per_host_per_s": 0.0,
    "max_wire_bytes": 2_000_000,
    "max_body_bytes": 4_000_000,
}


@pytest.fixture(scope="session")
def web() -> Iterator[SampleWeb]:
    with SampleWeb(hosts=loopback_hosts(3)) as running:
        urllib.request.urlopen(running.url("gzip_bomb")).close()  # made when first asked for, which takes a while
        yield running


@pytest.fixture
def near() -> FetchConfig:
    """Fetch settings for a web on this machine."""
    return FetchConfig(**NEAR)


@pytest.fixture
def config(near: FetchConfig) -> IngestConfig:
    return IngestConfig(fetch=near, image=ImageConfig(size=64), shards_at_once=2, workers=2)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[ClusterConfig]:
    """One local Ray for all tests of a process; starting one takes seconds."""
    settings = ClusterConfig(cpus=2, object_store_bytes=80 * 2**20)
    with session(settings):
        yield settings
    assert not ray.is_initialized()


@pytest.fixture
def read_corpus() -> Any:
    """Read every row of a corpus' plan and raw shards: input row number to its sidecar or rejection."""

    def read(corpus: Path) -> dict[int, dict[str, Any]]:
        rejected = pq.read_table(corpus / "plan" / "rejected-00000.parquet").to_pylist()
        rows = {row["row"]: {**row, "status": "filtered"} for row in rejected}
        for path in sorted((corpus / "raw").glob("*.parquet")):
            for row in pq.read_table(path).to_pylist():
                assert row["row"] not in rows
                rows[row["row"]] = row
        return rows

    return read
