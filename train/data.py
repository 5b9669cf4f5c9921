"""From shards to batches: a webdataset pipeline over this rank's part of the stream, made ahead."""

from __future__ import annotations

import io
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import webdataset as wds
from torch import Tensor

from infra.errors import UserError
from infra.logs import log
from infra.storage import Folder
from shards.device import on_device
from shards.index import Shard, load_or_scan
from shards.loader import Loader
from shards.placeholder import in_tar
from shards.reads import Reader
from shards.sample import BadSampleError, parse
from shards.stream import ShardStream
from train.augment import AugmentConfig
from train.config import DataConfig
from train.prepare import Preparation, together
from train.tokenizer import Tokenizer, pad

ENDLESS_EPOCHS = 1_000_000
"""Epochs asked of the stream: the loop decides when a run is over, by samples."""
CAPTIONS_AT_ONCE = 1024
CPU = torch.device("cpu")
START_METHOD = "forkserver"
"""Of loader processes: a fork of a rank would take over threads' locks and the process group's sockets."""


class Batch(NamedTuple):
    """One rank's part of a step.

    Attributes:
        images: cropped pictures, uint8 `[B, 3, H, W]`.
        tokens: token ids `[B, L]`, padded with 0.
        numbers: the samples' uniform draws `[B, DRAWS]`, for `augment`; for patch dropout, one a patch more.
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
    """The stream of one rank as `Batch`es, made ahead of time: by threads, or by loader processes.

    Args:
        config: what is read.
        crop: how pictures are cropped.
        tokenizer: cuts captions.
        context: longest text, tokens.
        rank: this process' number.
        world_size: number of processes.
        patch_draws: numbers that a sample draws for patch dropout.
        device: where batches are wanted; on their way to a card they are pinned, and copied while one is computed on.

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
        patch_draws: int = 0,
        device: torch.device = CPU,
    ) -> None:
        self.config, self.tokenizer, self.device = config, tokenizer, device
        self.rank, self.world_size = rank, world_size
        self.stream = open_stream(config, rank, world_size)
        self.preparation = self.stream.decode = Preparation(
            config, crop, tokenizer, context,
            steps_per_epoch=self.stream.steps_per_epoch,
            captions=shuffled(captions(config.folder), config.seed) if config.shuffle_captions else None,
            patch_draws=patch_draws,
        )  # fmt: skip
        self.loader = Loader(
            self.stream, workers=config.workers, transform=together, prefetch=config.prefetch,
            pin_memory=self._pins, start_method=START_METHOD,
        )  # fmt: skip
        self.waited_s = 0.0
        self.skipped: list[int] = []  # of the batches handed out, until `TrainingLog` has written them down
        self._state = self.stream.state_dict()

    @property
    def _pins(self) -> bool:
        return self.device.type == "cuda"

    @property
    def epoch_samples(self) -> int:
        """Samples of an epoch over all ranks."""
        return self.stream.steps_per_epoch * self.config.global_batch_size

    @property
    def total(self) -> int:
        """Samples of the whole run, of which `early_share` is a share."""
        return self.preparation.total

    @total.setter
    def total(self, samples: int) -> None:
        self.preparation.total = samples

    def state_dict(self) -> dict[str, int]:
        """Return where the stream stands after the last batch handed out."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a state, at any world size. Raises UserError for another corpus or batch."""
        self.loader.load_state_dict(state)
        self._state = self.stream.state_dict()

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches from after the last one handed out, without end; `waited_s` adds up the waiting."""
        self.loader.load_state_dict(self._state)  # it had read ahead of what was handed out
        pipeline = wds.DataPipeline(lambda: iter(self.loader), wds.map(self._batch))
        with Prefetched(pipeline, self.config.prefetch) as batches:
            started = time.monotonic()
            for batch in on_device(batches, self.device):
                self.waited_s += time.monotonic() - started
                self._state = batch.state
                self.skipped += batch.skipped
                yield batch
                started = time.monotonic()

    def _batch(self, columns: dict[str, Any]) -> Batch:
        tokens = pad(columns["ids"], self.preparation.context if self.config.pad_to == "context" else 0)
        return Batch(
            images=columns["images"].permute(0, 3, 1, 2),
            tokens=tokens.pin_memory() if self._pins else tokens,
            numbers=columns["draws"],
            keys=tuple(columns["keys"]),
            skipped=tuple(columns["skipped"]),
            state=self.loader.state_dict(),
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
        decode_threads=0 if config.workers else config.threads,
        cache_folder=config.stream_cache or None,
        cache_bytes=config.stream_cache_bytes,
    )


def captions(folder: str, limit: int | None = None) -> list[str]:
    """Return the captions of the first `limit` samples of a shard folder, in the folder's order.

    From the shards' sidecars; from a tar, whose every picture is read then, where it has none of as many samples as the
    index says. A sample there that cannot be read gives an empty caption, so that positions stay those of the index.
    """
    place, found = Folder(folder), list[str]()
    entries = load_or_scan(place)
    reader = Reader(place, entries)
    count = min(entries.samples, limit or entries.samples)
    for shard in entries.shards:
        wanted = min(shard.samples, count - len(found))
        if wanted <= 0:
            break
        told = _captions_of_sidecar(place, shard)
        found += _captions_of_tar(reader, shard, wanted) if told is None else told[:wanted]
    return found


def _captions_of_sidecar(folder: Folder, shard: Shard) -> list[str] | None:
    """Return a shard's captions as its sidecar has them; None where it has none, or not one for each sample."""
    if shard.sidecar_bytes is None:
        return None
    name = f"{shard.name}.parquet"
    try:
        file = pq.ParquetFile(io.BytesIO(folder.read(name)))
        if not {"status", "caption"} <= set(file.schema_arrow.names):
            return None
        columns = ("status", "caption", "reason", "offset")
        table = file.read(columns=[name for name in columns if name in file.schema_arrow.names])
        texts = table.filter(in_tar(table))["caption"].cast(pa.string())
    except (FileNotFoundError, pa.ArrowException) as error:
        problem = " ".join(str(error).split())
        log.warning("%s: cannot be read (%s); captions are read from its tar", folder.path(name), problem)
        return None
    if len(texts) != shard.samples:
        log.warning("%s: not of its tar's samples; captions are read from the tar", folder.path(name))
        return None
    return [text or "" for text in texts.to_pylist()]


def _captions_of_tar(reader: Reader, shard: Shard, count: int) -> list[str]:
    found: list[str] = []
    for first in range(shard.first_sample, shard.first_sample + count, CAPTIONS_AT_ONCE):
        for piece in reader.read(first, min(first + CAPTIONS_AT_ONCE, shard.first_sample + count)):
            if piece.fault is not None:
                raise piece.fault
            found += [_caption(piece.sample(piece.first + row)) for row in range(len(piece.ends))]
    return found


def shuffled(texts: Sequence[str], seed: int) -> list[str]:
    """Return the texts in a random order that `seed` names."""
    return [texts[number] for number in np.random.default_rng(seed).permutation(len(texts))]


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
