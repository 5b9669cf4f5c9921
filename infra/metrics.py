"""Every metric Pairmill exports, in one place: names, units and labels that the dashboards query.

Ray's agent on each node serves them to Prometheus, with `ray_` put before the name. Outside a Ray worker or
driver the calls do nothing that anyone sees.
"""

from __future__ import annotations

import functools
import os

import psutil
from ray.util.metrics import Counter, Gauge, Histogram

SECONDS = [0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800]


@functools.cache
def rows() -> Counter:
    """Rows through a stage, by `stage`, `status` and `reason`."""
    return Counter("pairmill_rows_total", "Rows finished", tag_keys=("stage", "status", "reason"))


@functools.cache
def shards() -> Counter:
    """Shards committed, by `stage`."""
    return Counter("pairmill_shards_total", "Shards committed", tag_keys=("stage",))


@functools.cache
def fetched_bytes() -> Counter:
    """Bytes of bodies received from the web."""
    return Counter("pairmill_fetched_bytes_total", "Bytes of bodies received")


@functools.cache
def host_failures() -> Counter:
    """Failed rows by `host` and `reason`, at most a few hundred hosts a worker (the rest under `other`)."""
    return Counter("pairmill_host_failures_total", "Failed rows by host", tag_keys=("host", "reason"))


@functools.cache
def step_seconds() -> Histogram:
    """Seconds spent in one step of a row's way (`fetch`, `image`)."""
    return Histogram("pairmill_row_step_seconds", "Seconds a row", boundaries=SECONDS, tag_keys=("step",))


@functools.cache
def shard_seconds() -> Histogram:
    """Seconds from a shard's start to its commit, by `stage`."""
    return Histogram("pairmill_shard_seconds", "Seconds a shard", boundaries=SECONDS, tag_keys=("stage",))


@functools.cache
def in_flight() -> Gauge:
    """Requests in flight in a worker, by `pid`."""
    return Gauge("pairmill_requests_in_flight", "Requests in flight", tag_keys=("pid",))


@functools.cache
def worker_memory_bytes() -> Gauge:
    """Resident memory of a worker process in bytes, by `pid`."""
    return Gauge("pairmill_worker_memory_bytes", "Resident memory of a worker", tag_keys=("pid",))


def observe_memory() -> int:
    """Record this process' resident memory; return it in bytes."""
    resident = int(psutil.Process().memory_info().rss)
    worker_memory_bytes().set(resident, tags={"pid": str(os.getpid())})
    return resident
