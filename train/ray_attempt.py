"""One start of Ray Train with so many ranks: what it takes, and what it ended with."""

from __future__ import annotations

import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from train.config import RunConfig
from train.ray_board import Board, Failure
from train.ray_worker import Job, run_worker


def room() -> int:
    """Return how many ranks the nodes that are there could hold."""
    kind = resource()
    return sum(int(node["Resources"].get(kind, 0)) for node in ray.nodes() if node["Alive"])


def resource() -> str:
    """Return what a rank takes one of: a graphics card where the cluster has any."""
    return "GPU" if any(node["Resources"].get("GPU") for node in ray.nodes() if node["Alive"]) else "CPU"


def board_here() -> Any:
    """Start a board on this node, which ranks that are lost do not take along."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Board).options(num_cpus=0, max_concurrency=10_000, scheduling_strategy=here).remote()


class Attempt(threading.Thread):
    """One start of Ray Train with `size` ranks; `error` is what it ended with, in Ray Train's words."""

    def __init__(self, config: RunConfig, run: Path, size: int, board: Any) -> None:
        super().__init__(name="ray-train", daemon=True)
        self.size = size
        self.error: Exception | None = None
        self._storage = tempfile.mkdtemp(prefix="pairmill-train-")
        job = Job.of(config, run, board)
        self._trainer = _trainer(job, size, config.parallel.timeout_s, self._storage)

    def run(self) -> None:
        """Wait for Ray Train to end."""
        from ray.train import TrainingFailedError

        try:
            self._trainer.fit()
        except (TrainingFailedError, RayError) as error:
            self.error = error

    def clear(self) -> None:
        """Remove what Ray Train has kept of the attempt."""
        shutil.rmtree(self._storage, ignore_errors=True)

    def found_no_room(self) -> bool:
        """Tell whether Ray Train waited in vain for others to make room; it has no public name for that."""
        return type(getattr(self.error, "controller_failure", None)).__name__ == "WorkerGroupStartupTimeoutError"

    def lost(self, failures: list[Failure]) -> list[int]:
        """Return the ranks that ended without a word: killed, or with their node."""
        told = {failure.rank for failure in failures}
        return sorted(set(getattr(self.error, "worker_failures", {})) - told)

    def words(self, failures: list[Failure]) -> str:
        """Return who failed and why, in one line."""
        lost = self.lost(failures)
        if lost:
            return f"rank {lost[0]} of {self.size} died (its process was killed, or its node lost)"
        if failures:
            first = failures[0]
            return f"rank {first.rank} of {self.size} on {first.host} died ({first.message})"
        return f"Ray Train failed ({' '.join(str(self.error).split())[:300]})"


def _trainer(job: Job, size: int, timeout_s: float, storage: str) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    on_cards = resource() == "GPU"
    none: dict[str, Any] = {"max_failures": 0, "controller_failure_limit": 0, "max_preemption_failures": 0}
    return TorchTrainer(
        run_worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if on_cards else "gloo", timeout_s=round(timeout_s)),
        scaling_config=ScalingConfig(num_workers=size, use_gpu=on_cards),
        run_config=RunConfig(
            storage_path=storage,
            failure_config=FailureConfig(**none),
        ),
    )
