"""What is embedded: the samples of a shard folder, an evaluation suite's tars among them, or picture files."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from infra.errors import UserError
from infra.logs import log
from infra.storage import Folder
from shards.index import load_or_scan, shard_names
from shards.layout import INDEX, SOURCE_KEY
from shards.reads import Reader
from shards.sample import FORMATS, IMAGES, UNDECODABLE, BadSampleError, parse
from shards.suite import NSHARDS, SuitePicture, pictures, read_picture
from train.evaluate.run import BATCH, square

FILES_A_PART = 10_000


class Prepared(NamedTuple):
    """A sample's keys and its picture, uint8 `[H, W, 3]`."""

    key: str
    source_key: str | None
    pixels: NDArray[np.uint8]


class Part(NamedTuple):
    """What one file of embeddings is of."""

    name: str
    samples: int


class Source(Protocol):
    """A folder of pictures, in parts."""

    folder: Folder
    parts: list[Part]
    facts: dict[str, Any]
    """What else tells it from a folder of other pictures."""

    def batches(self, part: Part, side: int, pool: ThreadPoolExecutor) -> Iterator[list[Prepared]]:
        """Yield a part's pictures that can be decoded, in order."""


def source_of(path: str) -> Source:
    """Return the pictures of a shard folder, of a suite in CLIP_benchmark's layout, or of a folder of files.

    Raises:
        UserError: no such folder, nothing of that kind in it, or a tar is damaged.
    """
    folder = Folder(path)
    if not folder.exists():
        raise UserError(f"{path}: no such folder; give raw/ or final/ of a corpus, or an evaluation suite")
    if folder.exists(NSHARDS):
        return Shards(folder / NSHARDS.partition("/")[0])
    if folder.exists(INDEX) or shard_names(folder):
        return Shards(folder)
    try:
        return Files(folder)
    except UserError:
        raise UserError(
            f"{folder.url}: no shards here (no committed .tar files) and no picture files; give raw/ or final/ of a "
            "corpus, or an evaluation suite"
        ) from None


class Shards:
    """The samples of a shard folder; a part is a shard."""

    def __init__(self, folder: Folder) -> None:
        self.folder, self.facts = folder, dict[str, Any]()
        index = load_or_scan(folder)
        self._shards = {shard.name: shard for shard in index.shards}
        self.parts = [Part(shard.name, shard.samples) for shard in index.shards]
        self._reader = Reader(folder, index)

    def batches(self, part: Part, side: int, pool: ThreadPoolExecutor) -> Iterator[list[Prepared]]:
        """Yield a shard's samples that can be decoded, in order. Raises UnreadableShardError."""
        shard = self._shards[part.name]
        stop = shard.first_sample + shard.samples
        for first in range(shard.first_sample, stop, BATCH):
            last = min(stop, first + BATCH)
            (piece,) = self._reader.read(first, last)
            if piece.fault is not None:
                raise piece.fault
            samples = [bytes(piece.sample(number)) for number in range(first, last)]
            prepared = pool.map(partial(_of_sample, where=piece.url, side=side), samples)
            if batch := [one for one in prepared if one is not None]:
                yield batch


class Files:
    """Picture files in a folder and below it; their keys are their paths in it."""

    def __init__(self, folder: Folder) -> None:
        self.folder, self._pictures = folder, pictures(folder)
        paths = "\n".join(one.key for one in self._pictures)
        self.facts = {"files_sha256": hashlib.sha256(paths.encode(errors="surrogateescape")).hexdigest()[:16]}
        starts = range(0, len(self._pictures), FILES_A_PART)
        self.parts = [
            Part(f"{number:05d}", min(FILES_A_PART, len(self._pictures) - start)) for number, start in enumerate(starts)
        ]

    def batches(self, part: Part, side: int, pool: ThreadPoolExecutor) -> Iterator[list[Prepared]]:
        """Yield a part's pictures that can be decoded, in order."""
        start = int(part.name) * FILES_A_PART
        some = self._pictures[start : start + part.samples]
        for first in range(0, len(some), BATCH):
            prepared = pool.map(partial(_of_file, folder=self.folder, side=side), some[first : first + BATCH])
            if batch := [one for one in prepared if one is not None]:
                yield batch


def _of_sample(data: bytes, where: str, side: int) -> Prepared | None:
    """Return a sample's picture as evaluation takes it; None for one that is left out, which is told."""
    key = "a sample"
    try:
        sample = parse(data, ("image",))
        key = sample["__key__"]
        body = next(sample[name] for name in IMAGES if name in sample)
        return Prepared(key, _source_key(sample), _pixels(body, side))
    except (BadSampleError, *UNDECODABLE) as error:
        log.warning("%s: %s has no embedding, it cannot be decoded (%s)", where, key, error)
        return None


def _of_file(picture: SuitePicture, folder: Folder, side: int) -> Prepared | None:
    try:
        return Prepared(picture.key, None, _pixels(read_picture(folder, picture), side))
    except UNDECODABLE as error:
        log.warning("%s: %s has no embedding, it cannot be decoded (%s)", folder.url, picture.key, error)
        return None


def _pixels(body: bytes, side: int) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(body), formats=FORMATS) as image:
        return square(image.convert("RGB"), side)


def _source_key(sample: dict[str, Any]) -> str | None:
    facts = json.loads(sample["json"]) if "json" in sample else None
    found = facts.get(SOURCE_KEY) if isinstance(facts, dict) else None
    return found if isinstance(found, str) else None
