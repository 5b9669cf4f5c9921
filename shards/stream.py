"""A shard folder as batches: every sample once an epoch, the same at every world size, resumable anywhere."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from infra.errors import RunError, UserError
from infra.logs import log
from infra.memory import give_back
from infra.storage import Folder
from shards import sample as one_sample
from shards.ahead import ReadAhead
from shards.cache import CACHE_BYTES, DiskCache
from shards.index import load_or_scan
from shards.order import (
    WINDOW_BLOCKS,
    Order,
    Remainder,
    Step,
    default_block_samples,
    default_lanes,
    substitute,
)
from shards.reads import PATIENCE_S, READ_TIMEOUT_S, Piece, Reader, UnreadableShardError

Sample = dict[str, Any]

READ_AHEAD_BYTES = 128 * 2**20
READ_THREADS = 8
MOST_STEPS_AHEAD = 256
_ORDER_STATE = ("samples", "global_batch", "lanes", "block_samples", "window_blocks")


class ShardStream(IterableDataset[list[Sample]]):
    """This rank's batches of a shard folder, as lists of sample dictionaries in slot order.

    A sample has `__key__`, `__url__` (its tar), the bytes of its members by extension (`jpg`, `txt`, `json`),
    and `__index__` (its number in the folder), `__epoch__`, `__step__` and `__slot__` (its place in the
    global batch). A corrupt sample is a hole: its slot is filled with another by a fixed rule, the sample
    there has `__hole__` with the number of the one it stands for, `holes` counts it and the log names it.

    Iterating goes on where the stream stands and ends after `epochs` epochs; iterating again once it has
    ended goes on with the epochs after those. In a loader worker the stream yields that worker's part of each
    of the rank's batches; `shards.loader.Loader` puts the parts together.

    Under a plain `DataLoader` or torchdata's `StatefulDataLoader` (`batch_size=None`) with `n` workers an item is
    such a part: items `n * i` to `n * i + n - 1` are batch `i`, in slot order. There `len` still counts batches,
    so that from two workers on the items are `n` times as many, and torch warns of it once `len` was called. A
    `StatefulDataLoader`'s state goes on at any item, under the same number of workers; without
    `persistent_workers` it iterates over the same epochs each time, so let `epochs` be all of the run's.
    `Loader` has none of these limits.
    """

    def __init__(
        self,
        folder: str | Folder,
        *,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        epochs: int = 1,
        decode: bool = False,
        lanes: int | None = None,
        block_samples: int | None = None,
        window_blocks: int | None = None,
        remainder: Remainder = "drop",
        needs: tuple[str, ...] = ("image", "txt"),
        skip_unreadable: bool = False,
        read_ahead_bytes: int = READ_AHEAD_BYTES,
        read_threads: int = READ_THREADS,
        patience_s: float = PATIENCE_S,
        read_timeout_s: float = READ_TIMEOUT_S,
        cache_folder: str | os.PathLike[str] | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Open the folder and read its index; no sample is read yet.

        `decode` turns images to uint8 RGB `[H, W, 3]`, `txt` to str and `json` to its value. `lanes`,
        `block_samples` and `window_blocks` belong to the order (see `shards.order`), as `remainder` does.
        `needs` names the members a sample must have (`image` for any image). `skip_unreadable` makes holes of
        the samples of a shard that stays unreadable for `patience_s` seconds, instead of ending the run.
        Beyond the windows in use, `read_ahead_bytes` are read ahead on `read_threads` threads.

        A read that fails is tried again for `patience_s` seconds; one from an object store that takes longer
        than `read_timeout_s` (and a second for each MiB) has failed. What is read is kept in `cache_folder`, on
        a local disk, within `cache_bytes`: all ranks and loader workers of a node may share it, and other
        streams with it (see `shards.cache`).

        Raises:
            UserError: no shards, an index of another version, a batch, rank or world size that does not work
            out.
        """
        super().__init__()
        self.folder = folder if isinstance(folder, Folder) else Folder(folder)
        self.rank, self.world_size, self.epochs, self.decode = rank, world_size, epochs, decode
        self.needs, self.skip_unreadable = needs, skip_unreadable
        self.read_ahead_bytes, self.read_threads, self.patience_s = read_ahead_bytes, read_threads, patience_s
        self.read_timeout_s, self.cache_folder, self.cache_bytes = read_timeout_s, cache_folder, cache_bytes
        self._opened_s = time.time()  # for the cache: what is used from here on stays
        self.holes = 0
        self.index = load_or_scan(self.folder)
        samples = self.index.samples
        if global_batch_size < 1 or world_size < 1 or not 0 <= rank < world_size or epochs < 1:
            raise UserError(
                f"global batch {global_batch_size}, rank {rank} of {world_size}, {epochs} epochs: "
                "batch, world size and epochs start at 1, ranks count from 0"
            )
        lanes = lanes or default_lanes(global_batch_size)
        a_sample = self.index.tar_bytes / max(1, samples)
        block_samples = block_samples or default_block_samples(samples, global_batch_size, lanes, a_sample)
        self.order = Order(
            samples, global_batch_size, lanes, block_samples, window_blocks or WINDOW_BLOCKS, seed, remainder
        )
        self._lanes_of(world_size)
        self._epoch = self._step = 0
        self._ended = False

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch, the same on every rank."""
        return self.order.steps

    def __len__(self) -> int:
        """Batches of all `epochs` epochs on this rank, from the first."""
        return self.epochs * self.order.steps

    def __iter__(self) -> Iterator[list[Sample]]:
        """Yield the batches from where the stream stands to the end of its epochs.

        Raises:
            RunError: a shard stays unreadable (and `skip_unreadable` is off); the message names it.
            UserError: in a loader worker, when lanes and workers do not work out.
        """
        lanes = self._lanes_here()
        reader = self._reader()
        ahead = ReadAhead(reader, self.read_threads)
        steps, waiting = self._steps(self._last_epoch(), lanes), deque[Step]()
        try:
            while True:
                while len(waiting) <= MOST_STEPS_AHEAD and (not waiting or ahead.ahead_bytes < self.read_ahead_bytes):
                    step = next(steps, None)
                    if step is None:
                        break
                    ahead.request(step)
                    waiting.append(step)
                if not waiting:
                    break
                step = waiting.popleft()
                batch = self._batch(step, ahead.take(step), reader)
                self.advance((step.epoch, step.step))
                if self._step == 0:
                    give_back()
                yield batch
            self._ended = True
        finally:
            ahead.close()

    def samples(self) -> Iterator[Sample]:
        """Yield the samples of this rank's batches one by one."""
        for batch in self:
            yield from batch

    def source(self) -> SampleSource:
        """Return this stream as a source: `wds.DataPipeline(stream.source(), wds.map(...), ...)`."""
        return SampleSource(self)

    def state_dict(self) -> dict[str, int]:
        """Return where the stream stands, and what its order is made of: a few whole numbers."""
        order = {name: int(getattr(self.order, name)) for name in _ORDER_STATE}
        return {"seed": self.order.seed, "epoch": self._epoch, "step": self._step, **order}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from `state`, at whatever world size or worker count it was taken.

        Seed, lanes, block and window are taken over from it.

        Raises:
            UserError: it belongs to another corpus or global batch, or its lanes do not fit this world size.
        """
        for name, what in (("samples", "samples in the corpus"), ("global_batch", "global batch")):
            now = getattr(self.order, name)
            if state.get(name, now) != now:
                raise UserError(f"stream state: {what}: {state[name]} there, {now} now; resume on the same")
        order = {name: state.get(name, getattr(self.order, name)) for name in _ORDER_STATE}
        self.order = Order(**order, seed=state["seed"], remainder=self.order.remainder)
        self._lanes_of(self.world_size)
        self._epoch, self._step, self._ended = state["epoch"], state["step"], False
        if self._step >= self.order.steps:
            self._epoch, self._step = self._epoch + 1, 0

    def check_workers(self, workers: int) -> None:
        """Make sure that every rank's lanes can be shared by `workers` loader processes. Raises UserError."""
        self._lanes_of(self.world_size * max(1, workers))

    def remaining(self) -> Iterator[tuple[int, int]]:
        """Yield (epoch, step) of what iterating would give, without reading: for readers elsewhere."""
        start, last_epoch = self._step, self._last_epoch()
        for epoch in range(self._epoch, last_epoch):
            yield from ((epoch, step) for step in range(start, self.order.steps))
            start = 0
        self._ended = True

    def advance(self, done: tuple[int, int]) -> None:
        """Stand after the batch of (epoch, step) `done`."""
        epoch, step = done
        self._epoch, self._step = (epoch + 1, 0) if step + 1 == self.order.steps else (epoch, step + 1)

    def _lanes_of(self, parts: int) -> int:
        """Return how many lanes each of `parts` readers has. Raises UserError if they cannot be equal."""
        if self.order.lanes % parts:
            raise UserError(
                f"global batch {self.order.global_batch} in {self.order.lanes} lanes cannot be shared by "
                f"{self.world_size} ranks ({parts} readers); take a batch, or lanes, that {parts} divides"
            )
        return self.order.lanes // parts

    def _lanes_here(self) -> range:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        each = self._lanes_of(self.world_size * count)
        start = (self.rank * count + number) * each
        return range(start, start + each)

    def _reader(self) -> Reader:
        where, cache = self.cache_folder, None
        if where is not None:
            cache = DiskCache(where, self.cache_bytes, self._opened_s)
        return Reader(
            Folder(self.folder.url), self.index, self.patience_s,
            timeout_s=self.read_timeout_s, cache=cache, block_samples=self.order.block_samples,
        )  # fmt: skip

    def _last_epoch(self) -> int:
        """Return the epoch to stop before: the next whole number of passes of `epochs` epochs."""
        passes = -(-(self._epoch + (self._step > 0)) // self.epochs)
        if self._ended or (self._epoch, self._step) == (0, 0):
            passes = self._epoch // self.epochs + 1
        self._ended = False
        return passes * self.epochs

    def _steps(self, last_epoch: int, lanes: range) -> Iterator[Step]:
        start = self._step
        for epoch in range(self._epoch, last_epoch):
            yield from self.order.walk(epoch, start, lanes=lanes)
            start = 0

    def _batch(self, step: Step, pieces: list[Piece], reader: Reader) -> list[Sample]:
        batch = []
        for slot, number, piece in zip(step.slot.tolist(), step.sample.tolist(), pieces, strict=True):
            try:
                sample = self._sample(piece, number)
            except one_sample.BadSampleError as error:
                self.holes += 1
                log.warning("%s: sample %d is a hole: %s", self.folder.path(piece.shard.tar), number, error)
                sample = next(self.stand_ins(number, reader))
            sample["__epoch__"], sample["__step__"], sample["__slot__"] = step.epoch, step.step, slot
            batch.append(sample)
        return batch

    def _sample(self, piece: Piece, number: int) -> Sample:
        if piece.fault is not None:
            if not self.skip_unreadable:
                raise UnreadableShardError(str(piece.fault))
            raise one_sample.BadSampleError("its shard cannot be read")
        sample = one_sample.parse(piece.data, self.needs, *piece.place(number))
        if self.decode:
            one_sample.decode(sample)
        sample["__url__"] = piece.url
        sample["__index__"] = number
        return sample

    def stand_ins(self, hole: int, reader: Reader | None = None) -> Iterator[Sample]:
        """Yield what may stand in for the bad sample `hole`, in the order to try: the same wherever and whenever.

        Each has `__hole__`. For a reader that finds a sample bad only when it decodes it.

        Raises:
            RunError: all were tried.
        """
        reader = reader or self._reader()
        for number in substitute(hole, self.order.samples):
            (piece,) = reader.read(number, number + 1)
            try:
                sample = self._sample(piece, number)
            except one_sample.BadSampleError:
                continue
            yield sample | {"__hole__": hole}
        raise RunError(
            f"{self.folder.url}: sample {hole} is bad and so is every other tried in its place; "
            "check the folder with `pairmill verify`"
        )


class SampleSource(IterableDataset[Sample]):
    """The samples of a `ShardStream` one by one, the first stage of a webdataset pipeline."""

    def __init__(self, stream: ShardStream) -> None:
        super().__init__()
        self.stream = stream

    def __iter__(self) -> Iterator[Sample]:
        return self.stream.samples()
