"""Every metric Pairmill exports, in one place: names, units and labels that the dashboards query.

Ray's agent on each node serves them to Prometheus, with `ray_` put before the name. Outside a Ray worker or
driver the calls do nothing that anyone sees.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping

import prometheus_client
import psutil
from ray.util.metrics import Counter as RayCounter
from ray.util.metrics import Gauge, Histogram

from infra.errors import UserError

_MAX_LABELLED_HOSTS = 300
_labelled_hosts: set[str] = set()
SECONDS = [0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800]


class Counter(RayCounter):
    """Ray's counter, but one that takes a zero: nothing to count must not fail the work that is counted."""

    def inc(self, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
        """Count `value` more."""
        if value > 0:
            super().inc(value, tags or {})


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
def requests() -> Counter:
    """Requests sent, by `outcome` (`body`, `redirect`, `miss`) and the `reason` of a miss."""
    return Counter("pairmill_requests_total", "Requests sent", tag_keys=("outcome", "reason"))


@functools.cache
def host_paused_seconds() -> Counter:
    """Seconds for which a `host` was let be, by `reason` (`rest` of the breaker, `retry_after`, `robots_txt`)."""
    return Counter("pairmill_host_paused_seconds_total", "Seconds a host was let be", tag_keys=("host", "reason"))


@functools.cache
def throttled_hosts() -> Gauge:
    """Hosts of a worker whose rows wait for their turn (bound on requests in flight, pace, pause), by `pid`."""
    return Gauge("pairmill_throttled_hosts", "Hosts whose rows wait for their turn", tag_keys=("pid",))


def host_label(host: str) -> str:
    """Return the host as a label, in ASCII; `other` once there are too many: a label's values must stay few."""
    if not host.isascii():
        host = host.encode("ascii", "backslashreplace").decode()
    if host not in _labelled_hosts:
        if len(_labelled_hosts) >= _MAX_LABELLED_HOSTS:
            return "other"
        _labelled_hosts.add(host)
    return host


@functools.cache
def step_seconds() -> Histogram:
    """Seconds spent in one step of a row's way.

    `resolve` (a lookup that no cache answered), `connect` (TLS included, and the lookup), `first_byte` (from the
    request to the answer's headers, the connection included), `body`, `fetch` (all of it, pauses included),
    `decode`, `write`.
    """
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


TRAINING: dict[str, str] = {
    "step": "Steps taken",
    "samples": "Samples seen",
    "epoch": "Epochs seen",
    "loss": "Loss, mean since the line before",
    "accuracy": "Share of pairs ranked first in the batch",
    "averaged_steps": "Steps that loss, accuracy and gradient norm are means over",
    "temperature": "1 / logit scale",
    "learning_rate": "Learning rate",
    "gradient_norm": "Norm of the gradient before clipping",
    "parameter_norm": "Norm of the parameters",
    "samples_per_s": "Samples a second, all ranks",
    "samples_per_s_device": "Samples a second of each rank",
    "mfu": "Model FLOP/s by the devices' peak",
    "waiting_share": "Share of the time spent waiting for data",
    "checkpoint_pause_s": "Seconds the loop has waited for checkpoints",
    "evaluate_s": "Seconds that measurements have taken",
    "skipped": "Samples that could not be used since the line before",
    "dropped_steps": "Bad steps dropped",
    "memory_bytes": "Resident memory of rank 0, bytes",
    "device_memory_bytes": "Most memory that rank 0 has had on its device, bytes",
    "seconds": "Training time, all interruptions",
    "zero_shot": "Top-1 accuracy on the suite",
}
"""Fields of a training run's log that are exported, as `pairmill_train_FIELD`, and what they are."""


class TrainingGauges:
    """A training run's numbers, served at `http://HOST:PORT/metrics`: no Ray agent runs beside a trainer.

    Args:
        port: of this machine.

    Raises:
        UserError: it is taken.
    """

    def __init__(self, port: int) -> None:
        registry = prometheus_client.CollectorRegistry()
        self._gauges = {
            name: prometheus_client.Gauge(f"pairmill_train_{name}", text, registry=registry)
            for name, text in TRAINING.items()
        }
        try:
            self._server, self._thread = prometheus_client.start_http_server(port, registry=registry)
        except OSError as error:
            raise UserError(f"log.prometheus_port: {port} cannot be served on ({error}); choose another") from None

    def set(self, values: Mapping[str, float]) -> None:
        """Set those of the values that are exported."""
        for name in values.keys() & self._gauges.keys():
            self._gauges[name].set(values[name])

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
