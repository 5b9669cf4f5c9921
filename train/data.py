"""From shards to batches: a webdataset pipeline over this rank's part of the stream, made ahead."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import webdataset as wds
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from infra.errors import UserError
from infra.logs import log
from infra.storage import Folder
from shards.index import load_or_scan
from shards.reads import Reader
from shards.sample import BadSampleError, parse
from shards.stream import Sample, ShardStream
from train.augment import AugmentConfig, crop_box, draws
from train.config import DataConfig
from train.pictures import DecodedCache
from train.tokenizer import Tokenizer, pad

ENDLESS_EPOCHS = 1_000_000
"""Epochs asked of the stream: the loop decides when a run is over, by samples."""
CAPTIONS_AT_ONCE = 1024
SKIPPED_NAMED = 5
"""Samples that cannot be used are named in the log up to so many on each rank, and counted beyond."""


@dataclass(frozen=True)
class Batch:
    """One rank's part of a step.

    Attributes:
        images: cropped pictures, uint8 `[B, 3, H, W]`.
        tokens: token ids `[B, L]`, padded with 0.
        numbers: the samples' uniform draws `[B, DRAWS]`, for `augment`.
        keys: the samples' keys.
        skipped: numbers of the samples that could not be used, and that others stand in for here.
        state: the stream's state after this batch.
    """

    images: Tensor
    tokens: Tensor
    numbers: Tensor
    keys: tuple[str, ...]
    skipped: tuple[int, ...]
    state: dict[str, int]


class PairReader:
    """The stream of one rank as `Batch`es, made ahead of time by a thread.

    Args:
        config: what is read.
        crop: how pictures are cropped.
        tokenizer: cuts captions.
        context: longest text, tokens.
        rank: this process' number.
        world_size: number of processes.

    Raises:
        UserError: no shards, a batch that the ranks do not divide, or a corpus smaller than a batch.
    """

    def __init__(
        self,
        config: DataConfig,
        crop: AugmentConfig,
        tokenizer: Tokenizer,
        context: int,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.config, self.crop, self.tokenizer, self.context = config, crop, tokenizer, context
        self.rank, self.world_size = rank, world_size
        self.stream = open_stream(config, rank, world_size)
        self.total = 0  # samples of the whole run, of which `early_share` is a share
        self.waited_s = 0.0
        self.skipped: list[int] = []  # of the batches handed out, until `TrainingLog` has written them down
        self._named: set[int] = set()
        self._state = self.stream.state_dict()
        self._cache = DecodedCache(config.cache_bytes, crop.margin)
        self._tokens: dict[str, list[int]] = {}
        self._shuffled = shuffled(captions(config.folder), config.seed) if config.shuffle_captions else None

    @property
    def epoch_samples(self) -> int:
        """Samples of an epoch over all ranks."""
        return self.stream.steps_per_epoch * self.config.global_batch_size

    def state_dict(self) -> dict[str, int]:
        """Return where the stream stands after the last batch handed out."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a state, at any world size. Raises UserError for another corpus or batch."""
        self.stream.load_state_dict(state)
        self._state = self.stream.state_dict()

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches from where the stream stands, without end; `waited_s` adds up the waiting."""
        with ThreadPoolExecutor(self.config.threads, thread_name_prefix="decode") as pool:
            local = self.config.global_batch_size // self.world_size
            pipeline = wds.DataPipeline(
                self.stream.source(),
                mapped_by(pool, self._prepare, ahead=2 * local),
                wds.batched(local, collation_fn=self._collate, partial=False),
            )
            with Prefetched(pipeline, self.config.prefetch) as batches:
                started = time.monotonic()
                for batch in batches:
                    self.waited_s += time.monotonic() - started
                    self._state = batch.state
                    self.skipped += batch.skipped
                    yield batch
                    started = time.monotonic()

    def _prepare(self, sample: Sample) -> Sample:
        try:
            picture = self._cache.picture(sample)
        except BadSampleError as error:
            sample, picture = self._stand_in(sample, error)
        numbers = draws(self.config.seed, sample["__epoch__"], [sample["__key__"]])[0]
        side = self._side(sample)
        box = crop_box(picture.size, numbers, self.crop)
        cropped = picture.resize((side, side), Image.Resampling.BICUBIC, box=box)
        return {**sample, "crop": np.asarray(cropped), "numbers": numbers, "ids": self._ids(sample)}

    def _stand_in(self, bad: Sample, error: BadSampleError) -> tuple[Sample, Image.Image]:
        """Return what takes the place of a sample whose picture does not decode, as the stream would fill it.

        It is a sound pair from elsewhere in the corpus, the same at every world size, so the batch keeps its size
        and no other sample moves. Raises RunError if none can be found.
        """
        hole: int = bad["__hole__"] if "__hole__" in bad else bad["__index__"]
        if hole not in self._named and len(self._named) < SKIPPED_NAMED:
            self._named.add(hole)
            log.warning("sample %d is skipped, another stands in: %s", hole, error)
        place = {name: bad[name] for name in ("__epoch__", "__step__", "__slot__")}
        stand_ins = self.stream.stand_ins(hole, bad["__epoch__"])
        while True:
            sample = next(stand_ins) | place
            try:
                return sample, self._cache.picture(sample)
            except BadSampleError:
                continue

    def _side(self, sample: Sample) -> int:
        step = sample["__epoch__"] * self.stream.steps_per_epoch + sample["__step__"]
        is_early = step * self.config.global_batch_size < self.config.early_share * self.total
        return self.config.early_image_size if is_early and self.config.early_image_size else self.config.image_size

    def _ids(self, sample: Sample) -> list[int]:
        caption = sample["txt"].decode("utf-8", "replace")
        if self._shuffled is not None:
            caption = self._shuffled[sample["__index__"]]
        ids = self._tokens.get(caption)
        if ids is None:
            ids = self.tokenizer.encode(caption, self.context)
            if len(self._tokens) < CAPTIONS_AT_ONCE * 64:
                self._tokens[caption] = ids
        return ids

    def _collate(self, samples: Sequence[Sample]) -> Batch:
        images = torch.from_numpy(np.stack([sample["crop"] for sample in samples]))
        numbers: NDArray[np.float32] = np.stack([sample["numbers"] for sample in samples])
        state = self.stream.state_dict() | {
            "epoch": samples[-1]["__epoch__"],
            "step": samples[-1]["__step__"] + 1,
        }
        return Batch(
            images=images.permute(0, 3, 1, 2),
            tokens=pad([sample["ids"] for sample in samples]),
            numbers=torch.from_numpy(numbers),
            keys=tuple(sample["__key__"] for sample in samples),
            skipped=tuple(sample["__hole__"] for sample in samples if "__hole__" in sample),
            state=state,
        )


def open_stream(config: DataConfig, rank: int = 0, world_size: int = 1) -> ShardStream:
    """Open a rank's stream of the corpus.

    Raises:
        UserError: no folder named, no shards there, a global batch that the ranks do not divide, or fewer
            samples than a batch.
    """
    if not config.folder:
        raise UserError("data.folder: names no folder; give the folder of shards to train on")
    batch = config.global_batch_size
    if batch % world_size:
        raise UserError(
            f"data.global_batch_size: {batch} cannot be shared evenly by {world_size} ranks; "
            f"take a multiple of {world_size}, for example {-(-batch // world_size) * world_size}"
        )
    samples = load_or_scan(Folder(config.folder)).samples
    if samples < batch:
        raise UserError(
            f"{config.folder}: its {samples} samples are fewer than one batch of {batch}; "
            + (f"set data.global_batch_size to {samples} or less" if samples > 1 else "build the corpus first")
        )
    return ShardStream(
        config.folder,
        global_batch_size=batch,
        rank=rank,
        world_size=world_size,
        seed=config.seed,
        epochs=ENDLESS_EPOCHS,
        cache_folder=config.stream_cache or None,
        cache_bytes=config.stream_cache_bytes,
    )


def captions(folder: str, limit: int | None = None) -> list[str]:
    """Return the captions of the first `limit` samples of a shard folder, in the folder's order.

    A sample that cannot be read gives an empty caption, so that positions stay those of the index.
    """
    reader = Reader(Folder(folder), load_or_scan(Folder(folder)))
    count = min(reader.index.samples, limit or reader.index.samples)
    found: list[str] = []
    for first in range(0, count, CAPTIONS_AT_ONCE):
        for piece in reader.read(first, min(first + CAPTIONS_AT_ONCE, count)):
            if piece.fault is not None:
                raise piece.fault
            found += [_caption(piece.sample(piece.first + row)) for row in range(len(piece.ends))]
    return found


def shuffled(texts: Sequence[str], seed: int) -> list[str]:
    """Return the texts in a random order that `seed` names."""
    return [texts[number] for number in np.random.default_rng(seed).permutation(len(texts))]


def mapped_by(
    pool: ThreadPoolExecutor, function: Callable[[Sample], Sample], ahead: int
) -> Callable[[Iterable[Sample]], Iterator[Sample]]:
    """Return a webdataset stage that applies `function` in a pool's threads, to `ahead` samples at a time.

    Samples come out in the order they went in.
    """

    def stage(samples: Iterable[Sample]) -> Iterator[Sample]:
        waiting: deque[Future[Sample]] = deque()
        for sample in samples:
            waiting.append(pool.submit(function, sample))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    return stage


class Prefetched:
    """Runs an iterable in a thread, `depth` items ahead; an error there is raised here."""

    def __init__(self, items: Iterable[Batch], depth: int) -> None:
        self._items = items
        self._queue: queue.Queue[Batch | BaseException | None] = queue.Queue(depth)
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="prefetch", daemon=True)

    def __enter__(self) -> Iterator[Batch]:
        self._thread.start()
        return self._taken()

    def __exit__(self, *_: object) -> None:
        self._left.set()
        while self._thread.is_alive():
            self._drain()
            self._thread.join(timeout=0.05)

    def _taken(self) -> Iterator[Batch]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def _fill(self) -> None:
        try:
            for item in self._items:
                self._queue.put(item)
                if self._left.is_set():
                    return
            self._queue.put(None)
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits for the batch
            self._queue.put(error)

    def _drain(self) -> None:
        while not self._queue.empty():
            self._queue.get_nowait()


def _caption(data: bytes) -> str:
    try:
        return str(parse(data, ("txt",))["txt"].decode("utf-8", "replace"))
    except BadSampleError:
        return ""
