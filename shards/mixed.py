"""Several shard folders mixed by weight into one stream of batches."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from typing import Any, NamedTuple

from infra.errors import UserError
from infra.logs import log
from infra.storage import Folder
from shards.ahead import ReadAhead, Wanted, read_ahead
from shards.batches import Batches, Place, Sample, Work, whole
from shards.kept import KeepList
from shards.mixture import PLACES, Mixture, Portion, shares
from shards.order import TooFewSamplesError, default_lanes
from shards.state import check_place, checked
from shards.stream import (
    OPTIONAL_STATE,
    ORDER_STATE,
    PLACE_STATE,
    READ_AHEAD_BYTES,
    READ_THREADS,
    ShardStream,
    check_threads,
)

MOST_LEFT_OUT = 0.01
"""Share of a folder that an epoch may leave out before the log says so."""
_NOT_SHARED = {
    "keep": "each folder of a mix has its own; give Source(folder, weight, keep)",
    "remainder": "a mix goes on with each folder's next epoch, it has none; leave it out",
}


class Source(NamedTuple):
    """A folder of a mix, its weight, and the part of it that is taken (see `ShardStream`'s `keep`)."""

    folder: str | Folder
    weight: float
    keep: KeepList | str | os.PathLike[str] | None = None


class MixedStream(Batches):
    """This rank's batches of several folders, each batch holding of every folder its weight's share.

    A sample is as `ShardStream` gives it, with `__corpus__`, the place of its folder among `sources`. `__epoch__` is
    that folder's own: a small folder of great weight is gone through more often than another, each time in a new
    order and each sample once, but for `samples % lanes` of them, others each time. An epoch of the mix is as many
    batches as all folders together fill. World size, loader workers, resuming, holes: all as `ShardStream` has them.
    """

    def __init__(
        self,
        sources: Sequence[Source | tuple[str | Folder, float]],
        *,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        epochs: int = 1,
        decode_threads: int = 0,
        lanes: int | None = None,
        read_ahead_bytes: int = READ_AHEAD_BYTES,
        **options: Any,
    ) -> None:
        """Open the folders, each with its weight; `options` are those of every folder's `ShardStream`.

        A part of a folder is `Source(folder, weight, keep="keep.txt")`.

        Raises:
            UserError: as `ShardStream`; a weight that is none; a folder with fewer samples than there are lanes.
        """
        super().__init__(
            rank=rank, world_size=world_size, epochs=epochs, global_batch=global_batch_size,
            decode_threads=decode_threads,
        )  # fmt: skip
        check_threads(decode_threads, options.get("read_threads", READ_THREADS))
        self.seed, self.read_ahead_bytes = whole("seed", seed), read_ahead_bytes
        for option in ("keep", "remainder"):
            if option in options:
                raise UserError(f"{option}: {_NOT_SHARED[option]}")
        parts = [_source(given) for given in sources]
        weights = shares([part.weight for part in parts])
        lanes = default_lanes(global_batch_size) if lanes is None else whole("lanes", lanes)
        if lanes < 1 or global_batch_size % lanes:
            raise UserError(f"lanes: {lanes} do not divide the global batch of {global_batch_size}")
        options |= {"lanes": lanes, "rank": rank, "world_size": world_size}
        self.streams = tuple(_stream(part, self.seed + number, options) for number, part in enumerate(parts))
        if options.get("block_samples") is None:
            for stream, share in zip(self.streams, weights, strict=True):
                stream.take_default_blocks(global_batch_size * share / PLACES)
        self.mixture = Mixture(tuple(stream.order for stream in self.streams), weights, global_batch_size)
        if not self.steps_per_epoch:
            samples = sum(stream.order.samples for stream in self.streams)
            raise UserError(
                f"the folders hold {samples} samples together, less than a global batch of {global_batch_size}; "
                "take a smaller batch"
            )
        self._lanes_of(world_size)

    @property
    def global_batch(self) -> int:
        """Samples of a step over all ranks."""
        return self.mixture.global_batch

    @property
    def lanes(self) -> int:
        """Lanes that ranks and loader workers share."""
        return self.mixture.lanes

    @property
    def steps_per_epoch(self) -> int:
        """Batches that all folders together fill."""
        return sum(stream.order.samples for stream in self.streams) // self.global_batch

    def state_dict(self) -> dict[str, int]:
        """Return where the stream stands, and what its order is made of: a few whole numbers a folder."""
        state = {"seed": self.seed, "epoch": self._epoch, "step": self._step, "mixed_batch": self.global_batch}
        for number, (stream, share) in enumerate(zip(self.streams, self.mixture.shares, strict=True)):
            state |= {f"{number}.{name}": value for name, value in stream.order_state().items()}
            state[f"{number}.share"] = share
        return state

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from `state`, at whatever world size or worker count it was taken.

        Seed, lanes, blocks and windows are taken over from it.

        Raises:
            UserError: it is no state of a mix; it is of other folders, weights or another batch, or its lanes do
            not fit this world size. The stream stands where it stood then.
        """
        now = {f"{number}.share": share for number, share in enumerate(self.mixture.shares)}
        there = {name: value for name, value in state.items() if name.endswith(".share")}
        if there != now or state.get("mixed_batch") != self.global_batch:
            raise UserError(
                f"stream state: shares {list(there.values())} of a batch of {state.get('mixed_batch')} there, "
                f"{list(now.values())} of {self.global_batch} now; resume with the same folders, weights and batch"
            )
        folders = range(len(self.streams))
        state = checked(
            state,
            (*PLACE_STATE, *(f"{number}.{name}" for number in folders for name in ORDER_STATE)),
            [f"{number}.{name}" for number in folders for name in OPTIONAL_STATE],
        )
        orders = []
        for number, stream in enumerate(self.streams):
            ours = {name.split(".", 1)[1]: value for name, value in state.items() if name.startswith(f"{number}.")}
            orders.append(stream.order_of(ours, state["seed"] + number))
        if len({(order.lanes, order.global_batch) for order in orders} | {(orders[0].lanes,) * 2}) > 1:
            raise UserError("stream state: its folders' lanes and batches differ; give what state_dict() gave")
        if self.global_batch % orders[0].lanes:
            raise UserError(f"stream state: its {orders[0].lanes} lanes do not divide the batch of {self.global_batch}")
        check_place(state, self.steps_per_epoch)
        before, self.mixture = self.mixture, Mixture(tuple(orders), self.mixture.shares, self.global_batch)
        try:
            self._lanes_of(self.world_size)
        except UserError:
            self.mixture = before
            raise
        self.seed = state["seed"]
        for stream, order in zip(self.streams, orders, strict=True):
            stream.order = order
        self._stand_at(state["epoch"], state["step"])

    def _read(self, lanes: range) -> Generator[tuple[Place, list[Work]], None, None]:
        with ExitStack() as stack:
            readers = [stream.reader() for stream in self.streams]
            ahead = [
                stack.enter_context(closing(ReadAhead(reader, stream.read_threads)))
                for reader, stream in zip(readers, self.streams, strict=True)
            ]
            portions: list[list[Portion]] = []

            def wanted() -> Iterator[list[Wanted]]:
                for step in self._steps(lanes):
                    portions.append(step)
                    yield [Wanted(ahead[one.corpus], one.step) for one in step]

            for _, taken in read_ahead(wanted(), self.read_ahead_bytes):
                step = portions.pop(0)
                place = divmod(step[0].step.step, self.steps_per_epoch)
                works = [
                    self.streams[one.corpus].work(one.step, pieces, readers[one.corpus], one.epochs.tolist())
                    for one, pieces in zip(step, taken, strict=True)
                ]
                yield place, [_marked(work, one.corpus, place[1]) for one, work in zip(step, works, strict=True)]

    def _steps(self, lanes: range) -> Iterator[list[Portion]]:
        first = self._epoch * self.steps_per_epoch + self._step
        stop = self._last_epoch() * self.steps_per_epoch
        for step in self.mixture.walk(first, stop, lanes):
            yield [one._replace(step=self.streams[one.corpus].in_folder(one.step)) for one in step]

    def _batch(self, place: Place, parts: list[Any]) -> list[Sample]:
        return sorted(super()._batch(place, parts), key=lambda sample: int(sample["__slot__"]))


def _source(given: Any) -> Source:
    if not isinstance(given, tuple | list) or not 2 <= len(given) <= len(Source._fields):
        raise UserError(f"sources: {given!r}; give (folder, weight) or Source(folder, weight, keep) for each folder")
    return Source(*given)


def _stream(part: Source, seed: int, options: dict[str, Any]) -> ShardStream:
    """Open a folder of a mix, and say in the log how much each epoch leaves out if that is more than a hundredth."""
    try:
        stream = ShardStream(part.folder, keep=part.keep, global_batch_size=options["lanes"], seed=seed, **options)
    except TooFewSamplesError:
        raise UserError(
            f"{part.folder}: fewer samples than the mix has lanes ({options['lanes']}); "
            "give fewer lanes, which must divide the batch, or leave that folder out"
        ) from None
    order = stream.order
    if order.left_over > MOST_LEFT_OUT * order.samples:
        log.warning(
            "%s: each of its epochs leaves out %d of %d samples, since %d lanes take as many each; give fewer lanes",
            stream.folder.url, order.left_over, order.samples, order.lanes,
        )  # fmt: skip
    return stream


def _marked(work: Work, corpus: int, step: int) -> Work:
    """Return work whose samples say which folder they are of, and count their step in the mix's epoch."""

    def take(first: int, stop: int) -> list[Sample]:
        return [sample | {"__corpus__": corpus, "__step__": step} for sample in work.take(first, stop)]

    return Work(take, work.samples)
