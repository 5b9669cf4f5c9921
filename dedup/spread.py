"""The stage's tasks, done in this process where they are few, on Ray where they are many."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import closing
from typing import Any, Protocol, TypeVar

import ray

from infra.cluster import ClusterConfig, run_bounded, session
from infra.errors import RunError, UserError

TaskT = TypeVar("TaskT", contravariant=True)

FEW_TASKS = 64
"""Up to so many tasks of a shard each, this process does the work itself: sooner done than a worker is started."""


class Worker(Protocol[TaskT]):
    """Does one task after the other."""

    def run(self, task: TaskT) -> Any:
        """Return the task's value."""


def has_cluster(cluster: ClusterConfig) -> bool:
    """Tell whether there are, or may be, workers on other machines than this one."""
    return cluster.address is not None or "RAY_ADDRESS" in os.environ or ray.is_initialized()


def here(worker: Worker[TaskT], tasks: Iterable[TaskT]) -> Iterator[tuple[TaskT, Any]]:
    """Yield each task with its value, done by `worker` in this process."""
    for task in tasks:
        yield task, worker.run(task)


def few_or_on_ray(
    worker: type[Worker[TaskT]], arguments: tuple[Any, ...], tasks: Sequence[TaskT], cluster: ClusterConfig
) -> Iterator[tuple[TaskT, Any]]:
    """Yield each task with its value: up to `FEW_TASKS` done here, more as `on_ray`."""
    if len(tasks) <= FEW_TASKS:
        return here(worker(*arguments), tasks)
    return on_ray(worker, arguments, tasks, cluster)


def on_ray(
    worker: type, arguments: tuple[Any, ...], tasks: Iterable[TaskT], cluster: ClusterConfig, ahead: int = 1
) -> Iterator[tuple[TaskT, Any]]:
    """Yield each task with its value, as they come, done by actors that are `worker(*arguments)`.

    Each holds up to `ahead` tasks more than the one that it does; 0 is for tasks that are long and large.

    Raises:
        RunError: a task failed.
        UserError: it did by a mistake of the user's.
    """
    count = len(tasks) if isinstance(tasks, Sized) else None
    if count == 0:
        return
    with session(cluster) as cores:
        actor: Any = ray.remote(num_cpus=1)(worker)
        outcomes = run_bounded(
            lambda _: actor.remote(*arguments),
            tasks,
            workers=min(cores, count or cores),
            retries=cluster.retries,
            ahead=ahead,
        )
        with closing(outcomes):
            for outcome in outcomes:
                if outcome.error is not None:
                    raise (UserError if outcome.mistake else RunError)(outcome.error)
                yield outcome.task, outcome.value
