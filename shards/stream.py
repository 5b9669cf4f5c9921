"""A shard folder as batches: every sample once an epoch, the same at every world size, resumable anywhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np

from infra.errors import RunError, UserError
from infra.storage import Folder
from shards import kept
from shards import sample as one_sample
from shards.ahead import ReadAhead, Wanted, read_ahead
from shards.batches import Batches, Place, Sample, SampleSource, Work, whole
from shards.cache import CACHE_BYTES
from shards.holes import HoleLog
from shards.index import load_or_scan
from shards.kept import KeepList
from shards.order import (
    REMAINDERS,
    WINDOW_BLOCKS,
    Order,
    Remainder,
    Step,
    default_block_samples,
    default_lanes,
    substitute,
)
from shards.reading import Reading
from shards.reads import PATIENCE_S, READ_TIMEOUT_S, Piece, Reader, UnreadableShardError
from shards.state import check_place, checked
from shards.taken import TakenSince

Decode = Callable[[Sample], None]
"""Changes a sample in place; one for which it raises BadSampleError is a hole. `__key__`, `__index__` and its place
(`__epoch__`, `__step__`, `__slot__`) are there."""
READ_AHEAD_BYTES = 128 * 2**20
READ_THREADS = 8
__all__ = ["Decode", "Sample", "SampleSource", "ShardStream"]
PLACE_STATE = ("seed", "epoch", "step")
ORDER_STATE = ("samples", "global_batch", "lanes", "block_samples", "window_blocks")
OPTIONAL_STATE = ("kept", "remainder")
"""What a state may lack, older ones since it is younger."""


class ShardStream(Batches):
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

    `decode` turns images to uint8 RGB `[H, W, 3]`, `txt` to str and `json` to its value; a function is called
    with each sample instead (`shards.pictures.RandomCrop` is one), in `decode_threads` threads if there are
    any. `keep` takes a part of the samples alone: a file of keys (see `shards.kept.load`), or a `KeepList`.

    `lanes`, `block_samples` and `window_blocks` belong to the order (see `shards.order`), as `remainder` does.
    `needs` names the members a sample must have (`image` for any image). `skip_unreadable` makes holes of
    the samples of a shard that stays unreadable for `patience_s` seconds, instead of ending the run, and tries it
    again every 10 minutes.
    Beyond the windows in use, `read_ahead_bytes` are read ahead on `read_threads` threads.

    A read that fails is tried again for `patience_s` seconds; one from an object store that takes longer
    than `read_timeout_s` (and a second for each MiB) has failed. What is read is kept in `cache_folder`, on
    a local disk, within `cache_bytes`: all ranks and loader workers of a node may share it, and other
    streams with it (see `shards.cache`).
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
        decode: bool | Decode = False,
        decode_threads: int = 0,
        keep: KeepList | str | os.PathLike[str] | None = None,
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

        Raises:
            UserError: no shards, an index of another version, a batch, rank or world size that does not work
            out, a keep list that is none of this folder, an option of another type.
        """
        super().__init__(
            rank=rank, world_size=world_size, epochs=epochs, global_batch=global_batch_size,
            decode_threads=decode_threads,
        )  # fmt: skip
        check_threads(decode_threads, read_threads)
        if isinstance(needs, str):
            raise UserError(f"needs: {needs!r}; give a tuple of members, ({needs!r},)")
        if not isinstance(decode, bool) and not callable(decode):
            raise UserError(f"decode: {decode!r}; give True, False, or a function such as shards.pictures.RandomCrop()")
        if keep is not None and not isinstance(keep, KeepList | str | os.PathLike):
            raise UserError(f"keep: a {type(keep).__name__}; give a file of keys, or a KeepList of numbers")
        self.folder = folder if isinstance(folder, Folder) else Folder(folder)
        self.decode, self.needs, self.skip_unreadable = decode, tuple(needs), skip_unreadable
        self.read_ahead_bytes, self.read_threads = read_ahead_bytes, read_threads
        self._reading = Reading(patience_s, read_timeout_s, cache_folder, cache_bytes)
        self._taken = TakenSince(self.folder)
        self.index = load_or_scan(self.folder)
        self.kept = kept.of_folder(keep, self.folder, self.index)
        self.order = Order(
            self.index.samples if self.kept is None else len(self.kept), whole("global_batch_size", global_batch_size),
            default_lanes(global_batch_size) if lanes is None else whole("lanes", lanes),
            1 if block_samples is None else whole("block_samples", block_samples),
            WINDOW_BLOCKS if window_blocks is None else whole("window_blocks", window_blocks),
            whole("seed", seed), remainder,
        )  # fmt: skip
        if block_samples is None:
            self.take_default_blocks(global_batch_size)
        self._lanes_of(world_size)
        self._stand_in_readers: dict[int, Reader] = {}
        self._hole_log = HoleLog()

    def take_default_blocks(self, slots: float) -> None:
        """Let blocks have as many samples as there is memory for where this stream fills `slots` of a step."""
        samples, lanes = self.order.samples, self.order.lanes
        a_sample = self.index.tar_bytes / max(1, self.index.samples)
        self.order = replace(self.order, block_samples=default_block_samples(samples, slots, lanes, a_sample))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_stand_in_readers": {}}

    @property
    def global_batch(self) -> int:
        """Samples of a step over all ranks."""
        return self.order.global_batch

    @property
    def lanes(self) -> int:
        """Lanes that ranks and loader workers share."""
        return self.order.lanes

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch, the same on every rank."""
        return self.order.steps

    def state_dict(self) -> dict[str, int]:
        """Return where the stream stands, and what its order is made of: a few whole numbers."""
        return {"seed": self.order.seed, "epoch": self._epoch, "step": self._step, **self.order_state()}

    def order_state(self) -> dict[str, int]:
        """Return what the order is made of, but for its seed."""
        optional = {"remainder": REMAINDERS.index(self.order.remainder)}
        if self.kept is not None:
            optional["kept"] = self.kept.digest
        return {name: int(getattr(self.order, name)) for name in ORDER_STATE} | optional

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from `state`, at whatever world size or worker count it was taken.

        Seed, lanes, block and window are taken over from it.

        Raises:
            UserError: it is no state of a stream; it belongs to another corpus, keep list, remainder or global
            batch, or its lanes do not fit this world size. The stream stands where it stood then.
        """
        state = checked(state, (*PLACE_STATE, *ORDER_STATE), OPTIONAL_STATE)
        if state["global_batch"] != self.order.global_batch:
            raise UserError(
                f"stream state: global batch: {state['global_batch']} there, {self.order.global_batch} now; "
                "resume on the same"
            )
        order = self.order_of(state, state["seed"])
        check_place(state, order.steps)
        before, self.order = self.order, order
        try:
            self._lanes_of(self.world_size)
        except UserError:
            self.order = before
            raise
        self._stand_at(state["epoch"], state["step"])

    def order_of(self, state: dict[str, int], seed: int) -> Order:
        """Return the order that a state describes. Raises UserError where it is none of this stream's samples."""
        if state["samples"] != self.order.samples:
            raise UserError(
                f"stream state: samples in the corpus: {state['samples']} there, {self.order.samples} now; "
                "resume on the same"
            )
        if state.get("kept") != (self.kept.digest if self.kept is not None else None):
            raise UserError("stream state: it was taken with another keep list, or one of the two has none")
        now = REMAINDERS.index(self.order.remainder)
        if state.get("remainder", now) != now:
            raise UserError(
                f"stream state: it was taken with another remainder than {self.order.remainder!r}; resume with the same"
            )
        return Order(**{name: state[name] for name in ORDER_STATE}, seed=seed, remainder=self.order.remainder)

    def reader(self) -> Reader:
        """Return a reader of this stream's samples, with connections of its own."""
        return self._reading.reader(self.folder, self.index, self.order.block_samples, self.kept)

    def _stand_in_reader(self) -> Reader:
        # One for all holes of a process, so that a shard that is lost costs the patience once.
        held = self._stand_in_readers.get(os.getpid())
        return held or self._stand_in_readers.setdefault(os.getpid(), self.reader())

    def in_folder(self, step: Step) -> Step:
        """Return a step of the order with the samples' numbers in the folder: others where not all are kept."""
        if self.kept is None:
            return step
        select = self.kept.select
        return replace(
            step, sample=select(step.sample), first=select(step.first), stop=select(step.stop - 1) + 1
        )  # fmt: skip

    def _read(self, lanes: range) -> Generator[tuple[Place, list[Work]]]:
        reader = self.reader()
        with closing(ReadAhead(reader, self.read_threads)) as ahead:
            steps = ([Wanted(ahead, self.in_folder(step))] for step in self._steps(self._last_epoch(), lanes))
            for ((_, step),), (pieces,) in read_ahead(steps, self.read_ahead_bytes):
                yield (step.epoch, step.step), [self.work(step, pieces, reader)]

    def _steps(self, last_epoch: int, lanes: range) -> Iterator[Step]:
        start = self._step
        for epoch in range(self._epoch, last_epoch):
            yield from self.order.walk(epoch, start, lanes=lanes)
            start = 0

    def work(self, step: Step, pieces: list[Piece], reader: Reader, epochs: list[int] | None = None) -> Work:
        """Return what makes a step's samples of their pieces; `epochs` of each, where the step has several."""
        slots, numbers = step.slot.tolist(), step.sample.tolist()
        self._taken.at_epoch(max(epochs, default=0) if epochs is not None else step.epoch, self.index)

        def take(first: int, stop: int) -> list[Sample]:
            samples = []
            for place in range(first, stop):
                epoch = step.epoch if epochs is None else epochs[place]
                where = {"__epoch__": epoch, "__step__": step.step, "__slot__": slots[place]}
                samples.append(self._sample_or_another(pieces[place], numbers[place], where, reader))
            return samples

        return Work(take, len(slots))

    def _sample_or_another(self, piece: Piece, number: int, where: dict[str, int], reader: Reader) -> Sample:
        try:
            return self._sample(piece, number, where)
        except one_sample.BadSampleError as error:
            self._hole_log.name(piece.url, number, error)
            return next(self.stand_ins(number, where, reader))

    def _sample(self, piece: Piece, number: int, where: dict[str, int]) -> Sample:
        if piece.fault is not None:
            if not self.skip_unreadable:
                raise UnreadableShardError(str(piece.fault))
            raise one_sample.BadSampleError("its shard cannot be read")
        if number in self._taken.numbers:
            raise one_sample.BadSampleError("it was taken down")
        sample = one_sample.parse(piece.data, self.needs, *piece.place(number))
        sample["__url__"], sample["__index__"] = piece.url, number
        sample |= where
        if callable(self.decode):
            self.decode(sample)
        elif self.decode:
            one_sample.decode(sample)
        return sample

    def stand_ins(self, hole: int, where: dict[str, int], reader: Reader | None = None) -> Iterator[Sample]:
        """Yield what may stand in for the bad sample `hole`, in the order to try: the same wherever and whenever.

        Each has `__hole__`, and `__epoch__`, `__step__` and `__slot__` as in `where`. For a reader that finds a sample
        bad only when it decodes it.

        Raises:
            RunError: all were tried.
        """
        reader = reader or self._stand_in_reader()
        place = hole if self.kept is None else self.kept.place(hole)
        for other in substitute(place, self.order.samples):
            number = other if self.kept is None else int(self.kept.select(np.array([other]))[0])
            (piece,) = reader.read(number, number + 1)
            try:
                sample = self._sample(piece, number, where)
            except one_sample.BadSampleError:
                continue
            yield sample | {"__hole__": hole}
        raise RunError(
            f"{self.folder.url}: sample {hole} is bad and so is every other tried in its place; "
            "check the folder with `pairmill verify`"
        )


def check_threads(decode_threads: int, read_threads: int) -> None:
    """Make sure that there can be so many threads. Raises UserError."""
    if decode_threads < 0 or read_threads < 1:
        raise UserError(
            f"decode_threads {decode_threads}, read_threads {read_threads}: give 0 or more to decode, 1 or more to read"
        )
