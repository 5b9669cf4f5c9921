"""What lies where: a folder a checkpoint, one safetensors file a rank, and `meta.json`, the commit, written last.

step-00000120/
  rank-00000.safetensors  rank-00001.safetensors    each tensor, or each shard of one, once
  meta.json                                         plain values, and where every tensor lies; digests, its own too
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError, model_validator
from pydantic_core import from_json

from infra.config import Config, parse
from infra.errors import RunError, UserError
from infra.storage import Folder
from train.config import RunConfig

CHECKPOINTS, META = "checkpoints", "meta.json"
PREFIX = "step-"
COMPANIONS = ("config.json", "tokenizer.json")
"""What a checkpoint is read with; beside the checkpoints where those are not in the run's folder."""
VALUES = ("step", "samples", "seconds", "data", "average_steps", "metrics", "guard", "optim")
"""What a run cannot go on without, beside its tensors."""
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Types by their names in safetensors files."""


class TornCheckpointError(RunError):
    """A checkpoint that is not what was written; the message says what is wrong with it."""


class Chunk(Config):
    """A block of a tensor, and the bytes that hold it."""

    offsets: tuple[int, ...] = Field(description="its first element, in the whole tensor")
    shape: tuple[int, ...] = Field(description="its extent")
    file: str = Field(description="file of the checkpoint")
    start: int = Field(ge=8, description="its first byte there")
    sha256: str = Field(description="digest of its bytes")


class TensorEntry(Config):
    """A tensor, and the chunks that it was written in."""

    dtype: Literal["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"]
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    def bytes_of(self, chunk: Chunk) -> int:
        """Return how long a chunk is in its file, in bytes."""
        return math.prod(chunk.shape) * DTYPES[self.dtype].itemsize


class Meta(Config):
    """`meta.json`."""

    format: Literal[3]
    step: int
    values: dict[str, Any] = Field(description="numbers, strings, lists and tables")
    files: dict[str, int] = Field(description="size of each file, bytes")
    tensors: dict[str, TensorEntry]
    sha256: str = Field(default="", description="digest of all the rest, see `signed`; empty until that is called")

    @model_validator(mode="after")
    def _is_consistent(self) -> Meta:
        for name in self.files:
            if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name) or name == META:
                raise ValueError(f"{name!r} is no name of a checkpoint's file")
        for name, entry in self.tensors.items():
            if sum(math.prod(chunk.shape) for chunk in entry.chunks) != math.prod(entry.shape):
                raise ValueError(f"{name} is not covered by its chunks")
            for chunk in entry.chunks:
                if not len(chunk.offsets) == len(chunk.shape) == len(entry.shape):
                    raise ValueError(f"a chunk of {name} has not its dimensions")
                within = zip(chunk.offsets, chunk.shape, entry.shape, strict=True)
                if any(first < 0 or extent < 0 or first + extent > whole for first, extent, whole in within):
                    raise ValueError(f"a chunk of {name} lies outside of it")
                if chunk.start + entry.bytes_of(chunk) > self.files.get(chunk.file, 0):
                    raise ValueError(f"a chunk of {name} lies outside of {chunk.file}")
            if _overlap(entry.chunks):
                raise ValueError(f"chunks of {name} overlap")
        return self

    def signed(self) -> bytes:
        """Return `meta.json`, with the SHA-256 of the rest of it as JSON: keys in order, no spaces, ASCII."""
        body = from_json(self.model_dump_json(exclude={"sha256"}))
        return json.dumps(body | {"sha256": _digest(body)}).encode()

    def gap(self) -> str:
        """Return what a run would miss in it to go on; an empty string if nothing."""
        for name in VALUES:
            if name not in self.values:
                return f"values.{name} is missing"
        if self.values["step"] != self.step:
            return f"values.step is {self.values['step']}, step {self.step}"
        model, average = self.shapes("model"), self.shapes("average")
        odd = model.keys() ^ average.keys() if average else set()
        if odd:
            return f"{min(odd)} is in one alone of model and average"
        if not model or "random" not in self.tensors:
            return f"{'random' if model else 'model'} is missing"
        return self._gap_in_optimizer()

    def _gap_in_optimizer(self) -> str:
        entries: dict[str, set[str]] = {}
        for name in self.shapes("optimizer"):
            owner, _, entry = name.rpartition(".")
            entries.setdefault(owner, set()).add(entry)
        every = set().union(*entries.values())
        for owner, found in entries.items():
            if owner not in self.tensors and f"model.{owner}" not in self.tensors:
                return f"optimizer.{owner} is of no weight"
            if found != every:
                return f"optimizer.{owner}.{min(every - found)} is missing"
        guard = self.values["guard"]
        taken = self.step - (guard.get("dropped", 0) if isinstance(guard, dict) else 0)
        return "optimizer is missing" if taken > 0 and not entries else ""

    def shapes(self, table: str) -> dict[str, list[int]]:
        """Return name and shape of the tensors of a table, `model` for one."""
        return {
            name.removeprefix(f"{table}."): list(entry.shape)
            for name, entry in self.tensors.items()
            if name.startswith(f"{table}.")
        }


@dataclass(frozen=True)
class Saved:
    """One checkpoint: its folder and the step after which it was taken."""

    path: str
    step: int

    def meta(self) -> Meta:
        """Read what it holds.

        Raises:
            TornCheckpointError: `meta.json` is damaged or not whole, or a file is missing, has another size or, on a
                local disk, cannot be read.
        """
        folder = Folder(self.path)
        try:
            with reading(folder, META, "missing, so the checkpoint was never finished"):
                data = folder.read(META)
            meta = Meta.model_validate_json(data)
        except ValidationError as error:
            what = error.errors()[0]
            where = ".".join(str(part) for part in what["loc"]) or "content"
            if "format" in where:
                raise TornCheckpointError(f"{self.path}: of another version of Pairmill ({what['msg']})") from None
            raise TornCheckpointError(f"{folder.path(META)}: damaged: {where}: {what['msg']}") from None
        body, named = from_json(data), _step(self.path)
        body.pop("sha256", "")
        fault = "it is not what was written" if meta.sha256 != _digest(body) else meta.gap()
        if not fault and named not in (meta.step, None):
            fault = f"it is of step {meta.step}"
        if fault:
            raise TornCheckpointError(f"{folder.path(META)}: damaged: {fault}")
        for name, size in meta.files.items():
            with reading(folder, name):
                there = folder.size(name)
            if there != size:
                raise TornCheckpointError(f"{folder.path(name)}: {there} bytes where {size} were written")
        return meta


@contextmanager
def reading(folder: Folder, name: str, missing: str = "missing") -> Iterator[None]:
    """Make a TornCheckpointError of what keeps the block from reading a checkpoint's file.

    On a local disk that is any OSError, such as a bad block; elsewhere only that the file is not there, for an outage
    must not throw away a sound checkpoint.
    """
    try:
        yield
    except FileNotFoundError:
        raise TornCheckpointError(f"{folder.path(name)}: {missing}") from None
    except OSError as error:
        if not folder.is_local:
            raise
        raise TornCheckpointError(f"{folder.path(name)}: cannot be read: {error.strerror or error}") from None


def saved(folder: Folder | str | os.PathLike[str]) -> list[Saved]:
    """Return the checkpoints below a folder, oldest first; one without its `meta.json` does not exist."""
    folder = folder if isinstance(folder, Folder) else Folder(folder)
    return [one for one in begun(folder) if Folder(one.path).exists(META)]


def begun(folder: Folder) -> list[Saved]:
    """Return the checkpoints below a folder, oldest first, those too whose `meta.json` was never written."""
    steps = {name: _step(name) for name in folder.folders()}
    found = [Saved(folder.path(name), step) for name, step in steps.items() if step is not None]
    return sorted(found, key=lambda one: one.step)


def place(config: RunConfig, run: str | os.PathLike[str]) -> Folder:
    """Return the folder in which a run keeps its checkpoints."""
    return Folder(config.checkpoint.folder) if config.checkpoint.folder else Folder(run) / CHECKPOINTS


def find(path: str | os.PathLike[str]) -> tuple[Folder, Folder]:
    """Return (folder of `config.json`, checkpoints folder or one checkpoint) for a run folder or a checkpoint.

    Raises:
        UserError: nothing there, or neither a run nor a checkpoint.
    """
    folder = Folder(path)
    if not folder.exists() or (folder.is_local and not os.path.isdir(folder.url)):  # noqa: PTH112 - a URL
        raise UserError(f"{path}: no such folder; give the folder of a run of `pairmill train`, or a checkpoint in it")
    name = folder.url.rstrip("/").rpartition("/")[2]
    if name.startswith(PREFIX) and folder.exists(META):
        above = _above(folder)
        return (above if above.exists(COMPANIONS[0]) else _above(above)), folder
    if saved(folder):
        return (folder if folder.exists(COMPANIONS[0]) else _above(folder)), folder
    if folder.exists(COMPANIONS[0]):
        config = parse(folder.read_json(COMPANIONS[0]), RunConfig, source=folder.path(COMPANIONS[0]))
        if saved(place(config, path)):
            return folder, place(config, path)
    if saved(folder / CHECKPOINTS):
        return folder, folder / CHECKPOINTS
    raise UserError(f"{path}: holds no checkpoint; give the folder of a run that has got as far as its first one")


def nested(tensors: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with tensors put into tables by the first part of their names: `model`, `average`."""
    content: dict[str, Any] = dict(values)
    for name, tensor in tensors.items():
        table, dot, rest = name.partition(".")
        if dot:
            content.setdefault(table, {})[rest] = tensor
        else:
            content[table] = tensor
    return content


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _step(path: str) -> int | None:
    """Return the step in the name of a checkpoint's folder, None if the name is none of a checkpoint's."""
    before, _, number = path.rstrip("/").rpartition("/")[2].partition(PREFIX)
    return int(number) if not before and number.isascii() and number.isdecimal() else None


def _overlap(chunks: Sequence[Chunk]) -> bool:
    """Tell whether two blocks have an element in common: a sweep along the first dimension, which is the one cut."""
    reaching: list[Chunk] = []
    for chunk in sorted(chunks, key=lambda one: one.offsets):
        if 0 in chunk.shape:
            continue
        reaching = [one for one in reaching if not one.shape or one.offsets[0] + one.shape[0] > chunk.offsets[0]]
        for other in reaching:
            sides = zip(chunk.offsets, chunk.shape, other.offsets, other.shape, strict=True)
            if all(a < b + right and b < a + left for a, left, b, right in sides):
                return True
        reaching.append(chunk)
    return False


def _above(folder: Folder) -> Folder:
    return Folder(folder.url.rstrip("/").rpartition("/")[0])
