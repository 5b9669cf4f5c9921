"""Where torch.distributed.checkpoint puts tensors: safetensors files in any `Folder`, and JSON instead of its pickle.

Its own metadata file is a pickle, which runs what is in it when it is read. Here nothing but numbers is read back.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from infra.storage import TEMPORARY_PREFIX, Folder, full_disk_is_named
from train.checkpoint.layout import DTYPES, META, PREFIX, Chunk, Meta, TensorEntry, TornCheckpointError, reading

READ_BYTES = 2**30
"""Bytes of one read; a system call gives no more than twice as many."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointWriter(StorageWriter):
    """Writes one checkpoint; every rank has its own, and the first commits.

    Args:
        folder: where the run keeps its checkpoints.
        step: steps taken so far.
        rank: this process' number, which names its file.
        values: what is kept beside the tensors, plain JSON.
        committed: called on the first rank once the checkpoint is there.
    """

    def __init__(
        self, folder: Folder, step: int, rank: int, values: dict[str, Any], committed: Callable[[], None] | None = None
    ) -> None:
        name = f"{PREFIX}{step:08d}"
        self.step, self.values, self.rank, self.committed = step, values, rank, committed
        self.final = folder / name
        self.place = folder / f"{TEMPORARY_PREFIX}{name}" if folder.is_local else self.final

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: a writer writes one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the coordinator prepares the place in `prepare_global_plan`, before anyone writes."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Remove what an interrupted write, or an earlier life of the run, has left under this name."""
        self.place.delete(META)
        self.place.delete_tree()
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's share into one file."""
        # The widest types first, so that all are aligned in the file.
        items = sorted(plan.items, key=lambda item: -_properties(item).dtype.itemsize)
        written = self._write_file(f"rank-{self.rank:05d}.safetensors", items, planner) if items else []
        done: Future[list[WriteResult]] = Future()
        done.set_result(written)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit: `meta.json`, and on a local disk the folder's own name."""
        chunks: dict[str, list[Chunk]] = {}
        files: dict[str, int] = {}
        for result in (one for share in results for one in share):
            chunk, size = result.storage_data
            chunks.setdefault(result.index.fqn, []).append(chunk)
            files[chunk.file] = size
        tensors = {
            name: TensorEntry(dtype=_NAMES[entry.properties.dtype], shape=tuple(entry.size), chunks=tuple(chunks[name]))
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        meta = Meta(format=3, step=self.step, values=self.values, files=files, tensors=tensors)
        with self._create(META) as stream:
            stream.write(meta.signed())
        if self.final.is_local:
            self.final.delete_tree()
            Path(self.place.url).rename(self.final.url)
        if self.committed is not None:
            self.committed()

    def abandon(self) -> None:
        """Remove what was written of a checkpoint that came to nothing: a full disk has no room for it."""
        self.place.delete_tree()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Tell that no place is chosen by name: a writer is given its own."""
        return False

    def _write_file(self, name: str, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        ends, header = _header(items)
        size = len(header) + (ends[-1] if ends else 0)
        written = []
        with self._create(name) as stream:
            stream.write(header)
            for item, end in zip(items, ends, strict=True):
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, Tensor)
                data = _raw(tensor)
                assert item.tensor_data is not None
                chunk = Chunk(
                    offsets=tuple(item.tensor_data.chunk.offsets),
                    shape=tuple(item.tensor_data.chunk.sizes),
                    file=name,
                    start=len(header) + end - len(data),
                    sha256=hashlib.sha256(data).hexdigest(),
                )
                stream.write(data)
                written.append(WriteResult(item.index, len(data), (chunk, size)))
        return written

    def _create(self, name: str) -> AbstractContextManager[IO[bytes]]:
        # On a local disk the folder is renamed when all of it is there; its files need no second name.
        return self._create_local(name) if self.place.is_local else self.place.create(name)

    @contextmanager
    def _create_local(self, name: str) -> Iterator[IO[bytes]]:
        path = Path(self.place.path(name))
        with full_disk_is_named(self.final.url):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())


class CheckpointReader(StorageReader):
    """Reads tensors of one checkpoint; a rank reads the chunks that its own tensors overlap.

    Args:
        place: the checkpoint's folder.
        meta: what it holds.
    """

    def __init__(self, place: Folder, meta: Meta) -> None:
        self.place, self.meta = place, meta

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: a reader reads one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return `meta.json` in DCP's own terms."""
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=DTYPES[entry.dtype]),
                    torch.Size(entry.shape),
                    [ChunkStorageMetadata(torch.Size(one.offsets), torch.Size(one.shape)) for one in entry.chunks],
                )
                for name, entry in self.meta.tensors.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: a reader was given what it needs."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read and check chunks and copy what is wanted of them. Raises TornCheckpointError."""
        last: tuple[Chunk, Tensor] | None = None
        for item in sorted(plan.items, key=lambda item: (item.storage_index.fqn, item.storage_index.offset or ())):
            name, offsets = item.storage_index.fqn, tuple(item.storage_index.offset or ())
            entry = self.meta.tensors[name]
            chunk = next(one for one in entry.chunks if one.offsets == offsets)
            if last is None or last[0] is not chunk:
                last = (chunk, self.chunk(name, chunk))
            part = last[1]
            for dimension, (first, extent) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                part = part.narrow(dimension, first, extent)
            target = planner.resolve_tensor(item).detach()
            target.copy_(part)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def tensor(self, name: str) -> Tensor:
        """Return a whole tensor. Raises TornCheckpointError."""
        entry = self.meta.tensors[name]
        if len(entry.chunks) == 1:
            return self.chunk(name, entry.chunks[0])
        whole = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        for chunk in entry.chunks:
            part = whole
            for dimension, (first, extent) in enumerate(zip(chunk.offsets, chunk.shape, strict=True)):
                part = part.narrow(dimension, first, extent)
            part.copy_(self.chunk(name, chunk))
        return whole

    def chunk(self, name: str, chunk: Chunk) -> Tensor:
        """Return one chunk of a tensor. Raises TornCheckpointError: missing, unreadable, or not what was written."""
        entry = self.meta.tensors[name]
        start, end = chunk.start, chunk.start + entry.bytes_of(chunk)
        data = bytearray()
        with reading(self.place, chunk.file):
            for first in range(start, end, READ_BYTES):
                data += self.place.read_range(chunk.file, first, min(first + READ_BYTES, end))
        if len(data) != end - start or hashlib.sha256(data).hexdigest() != chunk.sha256:
            raise TornCheckpointError(
                f"{self.place.path(chunk.file)}: bytes {start} to {end}, of {name}, are not those written"
            )
        dtype = DTYPES[entry.dtype]
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return flat.view(chunk.shape)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Tell that no place is chosen by name: a reader is given its own."""
        return False


def _properties(item: WriteItem) -> TensorProperties:
    assert item.tensor_data is not None, f"{item.index.fqn} is no tensor; it belongs into the values"
    return item.tensor_data.properties


def _header(items: list[WriteItem]) -> tuple[list[int], bytes]:
    """Return where each item ends among the file's data, and the header of a safetensors file of them."""
    table: dict[str, Any] = {}
    end, ends = 0, []
    for item in items:
        data = item.tensor_data
        assert data is not None
        start, end = end, end + math.prod(data.chunk.sizes) * data.properties.dtype.itemsize
        ends.append(end)
        table[_key(item.index, data.chunk, data.size)] = {
            "dtype": _NAMES[data.properties.dtype],
            "shape": list(data.chunk.sizes),
            "data_offsets": [start, end],
        }
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return ends, len(text).to_bytes(8, "little") + text


def _key(index: MetadataIndex, chunk: ChunkStorageMetadata, whole: torch.Size) -> str:
    is_whole = tuple(chunk.sizes) == tuple(whole)
    return index.fqn if is_whole else f"{index.fqn}@{','.join(map(str, chunk.offsets))}"


def _raw(tensor: Tensor) -> memoryview:
    flat = tensor.detach().contiguous().reshape(-1)
    content: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""
    return memoryview(content)
