"""What every stream of batches has: where it stands, its share of the lanes, decoding in threads."""

from __future__ import annotations

import functools
import operator
import os
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from infra.errors import UserError
from infra.logs import log
from infra.memory import give_back

Sample = dict[str, Any]
Place = tuple[int, int]
"""Epoch and step of a batch."""

PART_SAMPLES = 16
"""What a decoding thread takes at a time."""
GIVES_BACK_EVERY_S = 10.0
"""How often free memory is given back to the system, at the end of an epoch: pages that return cost as new ones do."""
BATCHES_AHEAD = 2
"""Batches that are decoded ahead of the one that is waited for."""


class Work:
    """A batch, or what it takes from one corpus, before it is parsed and decoded: `take(first, stop)` makes samples."""

    def __init__(self, take: Callable[[int, int], list[Sample]], samples: int) -> None:
        self.take, self.samples = take, samples

    def parts(self, pool: ThreadPoolExecutor | None) -> list[Callable[[], list[Sample]]]:
        """Return what gives the samples in order: at once in the pool's threads, or when it is called."""
        if pool is None:
            return [functools.partial(self.take, 0, self.samples)]
        starts = range(0, self.samples, PART_SAMPLES)
        return [pool.submit(self.take, start, min(start + PART_SAMPLES, self.samples)).result for start in starts]


def whole(option: str, value: Any) -> int:
    """Return an option's value as an int, whatever kind of whole number it is. Raises UserError for others."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise UserError(f"{option}: {value!r}; give a whole number")
    return operator.index(value)


class Batches(IterableDataset[list[Sample]]):
    """A rank's batches, in an order of lanes; the base of `ShardStream` and `MixedStream`.

    A subclass says what its lanes, batch and epochs are, and reads (`_read`). `holes` counts the samples that were
    bad and that others stood in for.
    """

    def __init__(self, *, rank: int, world_size: int, epochs: int, global_batch: int, decode_threads: int) -> None:
        """Check what holds for every stream. Raises UserError for numbers that do not work out."""
        super().__init__()
        numbers = {"rank": rank, "world_size": world_size, "epochs": epochs, "decode_threads": decode_threads}
        for name, value in {"global_batch_size": global_batch, **numbers}.items():
            whole(name, value)
        if global_batch < 1 or world_size < 1 or not 0 <= rank < world_size or epochs < 1:
            raise UserError(
                f"global batch {global_batch}, rank {rank} of {world_size}, {epochs} epochs: "
                "batch, world size and epochs start at 1, ranks count from 0"
            )
        self.rank, self.world_size, self.epochs, self.decode_threads = rank, world_size, epochs, decode_threads
        self.holes = 0
        self._epoch = self._step = 0
        self._ended = False
        self._passes = _LoaderPasses()
        self._gives_back_at = 0.0

    @property
    @abstractmethod
    def global_batch(self) -> int:
        """Samples of a step over all ranks."""

    @property
    @abstractmethod
    def lanes(self) -> int:
        """Lanes that ranks and loader workers share."""

    @property
    @abstractmethod
    def steps_per_epoch(self) -> int:
        """Batches of an epoch, the same on every rank."""

    @abstractmethod
    def state_dict(self) -> dict[str, int]:
        """Return where the stream stands, and what its order is made of: a few whole numbers."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a state, at whatever world size or worker count it was taken."""

    @abstractmethod
    def _read(self, lanes: range) -> Iterator[tuple[Place, list[Work]]]:
        """Yield this reader's part of each batch from where the stream stands, read and not yet parsed."""

    def __len__(self) -> int:
        """Batches of all `epochs` epochs on this rank, from the first."""
        return self.epochs * self.steps_per_epoch

    def __iter__(self) -> Iterator[list[Sample]]:
        """Yield the batches from where the stream stands to the end of its epochs.

        Raises:
            RunError: a shard stays unreadable (and `skip_unreadable` is off); the message names it.
            UserError: in a loader worker, when lanes and workers do not work out.
        """
        worker = get_worker_info()
        if worker is None:
            yield from self.from_here()
            return
        later = self._passes.join(worker.seed - worker.id, self._epoch, self._step)
        if later is not None:
            self._stand_at(later, 0)
            self._ended = True
        yield from self.from_here()
        self._passes.leave(self._epoch)

    def from_here(self) -> Iterator[list[Sample]]:
        """Yield what iterating yields, in a loader worker too from where this very copy stands."""
        threads = self.decode_threads
        pool = ThreadPoolExecutor(threads, "decode") if threads else None
        waiting: deque[tuple[Place, list[Callable[[], list[Sample]]]]] = deque()
        reading = self._read(self._lanes_here())
        try:
            for place, works in reading:
                waiting.append((place, [part for work in works for part in work.parts(pool)]))
                if len(waiting) > (BATCHES_AHEAD if pool else 0):
                    yield self._batch(*waiting.popleft())
            while waiting:
                yield self._batch(*waiting.popleft())
            self._ended = True
        finally:
            reading.close()  # type: ignore[attr-defined]  # a generator, whose reads under way are to end
            if pool is not None:
                pool.shutdown(wait=False, cancel_futures=True)

    def samples(self) -> Iterator[Sample]:
        """Yield the samples of this rank's batches one by one.

        The state stands after a batch once the last sample of it was taken: who stops in the midst of one goes on from
        its first sample, and sees some of it again, but misses none.
        """
        before = (self._epoch, self._step, self._ended)
        for batch in self:
            after = (self._epoch, self._step, self._ended)
            for number, sample in enumerate(batch, 1):
                self._epoch, self._step, self._ended = after if number == len(batch) else before
                yield sample
            before = (self._epoch, self._step, self._ended)

    def source(self) -> SampleSource:
        """Return this stream as a source: `wds.DataPipeline(stream.source(), wds.map(...), ...)`.

        What the pipeline took and holds (a shuffle's buffer, half a batch) counts as taken: see `samples`.
        """
        return SampleSource(self)

    def check_workers(self, workers: int) -> None:
        """Make sure that every rank's lanes can be shared by `workers` loader processes. Raises UserError."""
        self._lanes_of(self.world_size * max(1, workers))

    def remaining(self) -> Iterator[Place]:
        """Yield (epoch, step) of what iterating would give, without reading: for readers elsewhere."""
        start, last_epoch = self._step, self._last_epoch()
        for epoch in range(self._epoch, last_epoch):
            yield from ((epoch, step) for step in range(start, self.steps_per_epoch))
            start = 0
        self._ended = True

    def advance(self, done: Place) -> None:
        """Stand after the batch of (epoch, step) `done`."""
        epoch, step = done
        self._epoch, self._step = (epoch + 1, 0) if step + 1 == self.steps_per_epoch else (epoch, step + 1)
        # Said here and not when the iterator ends: who counts the batches never asks for one more.
        self._ended = self._step == 0 and self._epoch % self.epochs == 0

    def _stand_at(self, epoch: int, step: int) -> None:
        self._epoch, self._step, self._ended = epoch, step, False
        self._passes.forget()
        if self._step >= self.steps_per_epoch:
            self._epoch, self._step = self._epoch + 1, 0

    def _batch(self, place: Place, parts: list[Callable[[], list[Sample]]]) -> list[Sample]:
        batch = parts[0]() if len(parts) == 1 else [sample for part in parts for sample in part()]
        self.holes += sum("__hole__" in sample for sample in batch)
        self.advance(place)
        if self._step == 0 and time.monotonic() >= self._gives_back_at:
            give_back()
            self._gives_back_at = time.monotonic() + GIVES_BACK_EVERY_S
        return batch

    def _lanes_of(self, parts: int) -> int:
        """Return how many lanes each of `parts` readers has. Raises UserError if they cannot be equal."""
        if self.lanes % parts:
            raise UserError(
                f"global batch {self.global_batch} in {self.lanes} lanes cannot be shared by "
                f"{self.world_size} ranks ({parts} readers); take a batch, or lanes, that {parts} divides"
            )
        return self.lanes // parts

    def _lanes_here(self) -> range:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        each = self._lanes_of(self.world_size * count)
        start = (self.rank * count + number) * each
        return range(start, start + each)

    def _last_epoch(self) -> int:
        """Return the epoch to stop before: the next whole number of passes of `epochs` epochs."""
        passes = -(-(self._epoch + (self._step > 0)) // self.epochs)
        if self._ended or (self._epoch, self._step) == (0, 0):
            passes = self._epoch // self.epochs + 1
        elif (self._epoch, self._step) == (passes * self.epochs, 0):
            log.warning("the stream's state stands at the end of its %d epochs: nothing is left of them", self.epochs)
        self._ended = False
        return passes * self.epochs


class _LoaderPasses:
    """Where the passes of a plain `DataLoader`'s workers begin, who are forked anew for each from the same copy.

    Three numbers in shared memory: the pass that is on (by its seed, which its workers share), the epoch at which it
    began, and the epoch at which the last one to end did. Workers write them without a lock: those of one pass all
    write the same.
    """

    def __init__(self) -> None:
        self._numbers = torch.zeros(3, dtype=torch.int64).share_memory_()
        self._process = 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._numbers.share_memory_()  # a copy's are its own, but its workers' too

    def join(self, seed: int, epoch: int, step: int) -> int | None:
        """Return the epoch at which this pass begins; None where the worker's copy stands right itself."""
        is_new_copy, self._process = self._process != os.getpid(), os.getpid()
        if not is_new_copy or step:
            return None
        if int(self._numbers[0]) != seed:
            self._numbers[1] = max(epoch, int(self._numbers[2]))
            self._numbers[0] = seed
        begins = int(self._numbers[1])
        return begins if begins > epoch else None

    def leave(self, epoch: int) -> None:
        """Note that the pass ended before `epoch`."""
        self._numbers[2] = epoch

    def forget(self) -> None:
        """Begin anew: the stream was told where it stands. In a worker, what it was told holds for it alone."""
        self._process = os.getpid() if get_worker_info() is not None else 0
        if get_worker_info() is None:
            self._numbers.zero_()


class SampleSource(IterableDataset[Sample]):
    """The samples of a stream one by one, the first stage of a webdataset pipeline."""

    def __init__(self, stream: Batches) -> None:
        super().__init__()
        self.stream = stream

    def __iter__(self) -> Iterator[Sample]:
        return self.stream.samples()
