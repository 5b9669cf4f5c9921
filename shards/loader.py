"""Loader processes for a stream: each prepares its lanes' part, whole batches come out in slot order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data._utils.pin_memory import pin_memory

from infra.errors import RunError, UserError
from infra.logs import log
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
        worker. `merge` puts the parts of one batch together; by default lists are joined, tensors and arrays
        concatenated on their first axis, mappings of them by key, tuples by place. `prefetch` batches wait
        ready in each worker. With `pin_memory` the tensors of a batch are in memory that an accelerator copies
        from by itself, where there is one.

        Raises:
            UserError: workers and lanes do not work out.
        """
        if workers < 0 or prefetch < 1:
            raise UserError(
                f"workers {workers}, prefetch {prefetch}: give 0 or more workers, and 1 or more to prefetch"
            )
        self.stream, self.workers = stream, workers
        self._transform, self._merge = transform or _as_is, merge or joined
        self._prefetch, self._start_method = prefetch, start_method
        self._pins = pin_memory and torch.accelerator.is_available()
        if pin_memory and not self._pins:
            log.warning("pin_memory: there is no accelerator here; batches stay where they are")
        stream.check_workers(workers)

    def __len__(self) -> int:
        """Batches of all epochs, as the stream's own length."""
        return len(self.stream)

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches from where the stream stands to the end of its epochs.

        Raises:
            RunError: as the stream, or a loader process was killed.
            UserError: `merge` is the default one, and cannot join what `transform` gives.
        """
        if not self.workers:
            for batch in map(self._transform, self.stream):
                yield pin_memory(batch) if self._pins else batch
            return
        parts = iter(
            DataLoader(
                _Parts(self.stream, self._transform),
                batch_size=None,
                collate_fn=_as_is,
                num_workers=self.workers,
                prefetch_factor=self._prefetch,
                multiprocessing_context=self._start_method,
                generator=torch.Generator(),  # the process' own one belongs to what is trained, and is resumed
            )
        )
        for step in self.stream.remaining():
            batch = []
            for _ in range(self.workers):
                part, holes = _next(parts)
                self.stream.holes += holes
                batch.append(part)
            self.stream.advance(step)
            merged = self._merge(batch)
            # Not the parts, as a `DataLoader` would: what they are joined to is memory of its own.
            yield pin_memory(merged) if self._pins else merged

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
    """Join the parts of one batch: lists, tensors and arrays on axis 0, mappings of them by key, tuples by place.

    A part alone is the batch. Of tensors and arrays those without rows, as an epoch's last batch may have, are left
    out: their other axes need not be those of the rest.

    Raises:
        UserError: something else is in them, of which it cannot be told how parts make a batch.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, torch.Tensor | np.ndarray) and first.ndim:
        filled = [part for part in parts if len(part)] or parts[:1]
        if len(filled) == 1:
            return filled[0]
        return torch.cat(filled) if isinstance(first, torch.Tensor) else np.concatenate(filled)
    if isinstance(first, Mapping):
        return {name: joined([part[name] for part in parts]) for name in first}
    if isinstance(first, tuple):
        columns = [joined(list(column)) for column in zip(*parts, strict=True)]
        return type(first)(*columns) if hasattr(first, "_fields") else tuple(columns)
    if isinstance(first, list):
        return [item for part in parts for item in part]
    kind = f"{type(first).__name__} without an axis" if hasattr(first, "ndim") else type(first).__name__
    raise UserError(
        f"loader: workers' parts of a batch have a {kind}, which cannot be joined; have `transform` give tensors, "
        "arrays, lists, or mappings and tuples of them, or give a `merge`"
    )


def _as_is(value: Any) -> Any:
    return value
