"""Loader processes for a stream: each prepares its lanes' part, whole batches come out in slot order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data._utils.pin_memory import pin_memory

from infra.errors import RunError
from shards.batches import Batches, Sample

Transform = Callable[[list[Sample]], Any]


class Loader:
    """This rank's batches of a `ShardStream`, read and transformed by `workers` processes (0: in this one).

    The batches are those of the stream, in its order, for every number of workers whose product with the
    world size divides the lanes. The stream's state stands at the last batch handed out here, so `state_dict`
    may be taken at any moment.
    """

    def __init__(
        self,
        stream: Batches,
        *,
        workers: int = 0,
        transform: Transform | None = None,
        merge: Callable[[list[Any]], Any] | None = None,
        prefetch: int = 2,
        pin_memory: bool = False,
        start_method: str | None = None,
    ) -> None:
        """Set up the loader; processes start when it is iterated.

        `transform` turns a worker's part of a batch (a list of samples) into what training takes, in the
        worker. `merge` puts the parts of one batch together; by default lists are joined, tensors
        concatenated on their first axis, mappings of them by key, tuples by place. `prefetch` batches wait
        ready in each worker.

        Raises:
            UserError: workers and lanes do not work out.
        """
        self.stream, self.workers = stream, workers
        self._transform, self._merge = transform or _as_is, merge or joined
        self._prefetch, self._pin, self._start_method = prefetch, pin_memory, start_method
        stream.check_workers(workers)

    def __len__(self) -> int:
        """Batches of all epochs, as the stream's own length."""
        return len(self.stream)

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches from where the stream stands to the end of its epochs.

        Raises:
            RunError: as the stream, or a loader process was killed.
        """
        if not self.workers:
            for batch in map(self._transform, self.stream):
                yield pin_memory(batch) if self._pin else batch
            return
        parts = iter(
            DataLoader(
                _Parts(self.stream, self._transform),
                batch_size=None,
                collate_fn=_as_is,
                num_workers=self.workers,
                prefetch_factor=self._prefetch,
                pin_memory=self._pin,
                multiprocessing_context=self._start_method,
            )
        )
        for step in self.stream.remaining():
            batch = []
            for _ in range(self.workers):
                part, holes = _next(parts)
                self.stream.holes += holes
                batch.append(part)
            self.stream.advance(step)
            yield self._merge(batch)

    def state_dict(self) -> dict[str, int]:
        """Return the stream's state after the last batch handed out."""
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from `state` at the next iteration, whatever number of workers it was taken with."""
        self.stream.load_state_dict(state)
        self.stream.check_workers(self.workers)


class _Parts(IterableDataset[tuple[Any, int]]):
    """A worker's part of each batch, and how many holes it had."""

    def __init__(self, stream: Batches, transform: Transform) -> None:
        super().__init__()
        self.stream, self.transform = stream, transform

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        for samples in self.stream.from_here():
            yield self.transform(samples), sum("__hole__" in sample for sample in samples)


def _next(parts: Iterator[tuple[Any, int]]) -> tuple[Any, int]:
    try:
        return next(parts)
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise RunError(
            f"a loader process was killed, by the system where memory ran out ({' '.join(str(error).split())}); "
            "go on from the last state"
        ) from error


def joined(parts: list[Any]) -> Any:
    """Join the parts of one batch: lists, tensors on axis 0, mappings of them by key, tuples by place."""
    first = parts[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(parts)
    if isinstance(first, Mapping):
        return {name: joined([part[name] for part in parts]) for name in first}
    if isinstance(first, tuple):
        return tuple(joined(list(column)) for column in zip(*parts, strict=True))
    return [item for part in parts for item in part]


def _as_is(value: Any) -> Any:
    return value
