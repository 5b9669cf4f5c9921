"""The worker of `repack`: selects the kept samples of a raw shard, and writes one final shard."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from infra.errors import RunError, UserError
from infra.storage import Folder
from shards import index, sample
from shards.buffers import BufferPool
from shards.kept import KeepList
from shards.layout import FINAL, RAW, SOURCE_KEY, sample_key, shard_name
from shards.order import Order
from shards.reads import PATIENCE_S, Reader
from shards.selection import Kept, select, sidecar
from shards.writer import writing

BLOCK_SAMPLES, WINDOW_BLOCKS = 256, 8
"""Reads of this many kept samples, moved about within windows of so many of them."""
FEWEST_BLOCKS = 256
RAW_SHARDS_HELD = 16


@dataclass(frozen=True)
class Layout:
    """What final shards hold: `kept[i]` samples of raw shard `names[i]`. `digest` names the selection."""

    names: list[str]
    kept: list[int]
    samples_per_shard: int
    seed: int
    digest: str

    @property
    def samples(self) -> int:
        """Samples kept in all."""
        return sum(self.kept)

    @property
    def shards(self) -> int:
        """Final shards."""
        return -(-self.samples // self.samples_per_shard)

    def bounds(self, number: int) -> tuple[int, int]:
        """Return the first and the end of a final shard's samples, in the final order."""
        return number * self.samples // self.shards, (number + 1) * self.samples // self.shards

    def order(self) -> Order:
        """Return the final order: one lane, one sample a step, shuffled as the stream would."""
        block = max(1, min(BLOCK_SAMPLES, self.samples // FEWEST_BLOCKS))
        return Order(self.samples, 1, 1, block, WINDOW_BLOCKS, self.seed)


class Repacker:
    """One worker; made a Ray actor by the stage."""

    def __init__(self, corpus: str, layout: Layout | None = None) -> None:
        """Work on `corpus`; a worker that writes needs the layout."""
        self.corpus, self.layout = Folder(corpus), layout
        self._raw = _RawShards(self.corpus)

    def run(self, task: tuple[str, int, str]) -> dict[str, Any]:
        """Do `("select", number, raw shard)` or `("write", number, final shard)`.

        Raises:
            RunError: a raw shard is damaged or the disk is full; the message names it.
        """
        what, number, name = task
        if what == "select":
            found = select(self.corpus, name)
            return {"kept": len(found.rows), "digest": found.digest(), "removed": found.removed}
        return self._write(number)

    def _write(self, number: int) -> dict[str, Any]:
        layout = self.layout
        assert layout is not None
        first, stop = layout.bounds(number)
        more = {"layout": layout.digest}
        with writing(self.corpus / FINAL, shard_name(number), self._schema(layout), more) as writer:
            for row, (fields, image, extension) in enumerate(self._samples(layout, first, stop)):
                key = sample_key(number, row)
                writer.add(fields | {SOURCE_KEY: fields["key"], "key": key}, image, extension)
        return {"successes": stop - first}

    def _schema(self, layout: Layout) -> pa.Schema:
        schema = sidecar(self.corpus, layout.names[0]).schema.remove_metadata()
        if SOURCE_KEY in schema.names:
            raise UserError(f"{self.corpus.url}: the input has a column '{SOURCE_KEY}'; rename it and plan again")
        return schema.append(pa.field(SOURCE_KEY, pa.string(), nullable=False))

    def _samples(self, layout: Layout, first: int, stop: int) -> Iterator[tuple[dict[str, Any], bytes, str]]:
        """Yield (sidecar row, image, extension) of samples `[first, stop)` of the final order.

        Held in memory: the runs of one window, at most `BLOCK_SAMPLES * WINDOW_BLOCKS` samples.
        """
        starts = np.concatenate([[0], np.cumsum(layout.kept)])
        held: OrderedDict[int, tuple[int, int, list[tuple[dict[str, Any], bytes, str]]]] = OrderedDict()
        for step in layout.order().walk(0, first, stop):
            run, begin, number = int(step.run[0]), int(step.first[0]), int(step.sample[0])
            if run not in held:
                for old in [name for name, (_, until, _) in held.items() if until < step.step]:
                    del held[old]
                held[run] = (begin, int(step.until[0]), self._run(layout, starts, begin, int(step.stop[0])))
            yield held[run][2][number - begin]

    def _run(
        self, layout: Layout, starts: npt.NDArray[np.int64], first: int, stop: int
    ) -> list[tuple[dict[str, Any], bytes, str]]:
        """Read the kept samples `[first, stop)`, counted over all raw shards in their order."""
        out = []
        while first < stop:
            place = int(np.searchsorted(starts, first, side="right")) - 1
            end = min(stop, int(starts[place + 1]))
            begin = int(starts[place])
            out += self._raw.samples(layout.names[place], first - begin, end - begin, layout.kept[place])
            first = end
        return out


class _RawShards:
    """Reads kept samples of raw shards; what was learnt of the last few shards is kept."""

    def __init__(self, corpus: Folder) -> None:
        self.corpus, self.folder, self._buffers = corpus, corpus / RAW, BufferPool()
        self._learn = functools.lru_cache(maxsize=RAW_SHARDS_HELD)(self._learn_anew)

    def samples(self, name: str, first: int, stop: int, expected: int) -> list[tuple[dict[str, Any], bytes, str]]:
        """Return (sidecar row, image, extension) of kept samples `[first, stop)` of a raw shard.

        Where little lies between them it is one read; what lies between is not held.

        Raises:
            RunError: the shard is damaged, or changed since its samples were counted.
        """
        kept, table, reader = self._learn(name)
        if len(kept.rows) != expected:
            raise RunError(f"{self.folder.path(name)}: changed while repack was at work; run it again")
        places = kept.places[first:stop].tolist()
        bodies: list[bytes] = []
        for piece in reader.read(places[0], places[-1] + 1):
            if piece.fault is not None:
                raise piece.fault
            end = piece.first + len(piece.ends)
            bodies += [piece.sample(place) for place in places if piece.first <= place < end]
        rows = table.take(pa.array(kept.rows[first:stop])).to_pylist()
        return [(row, *self._image(name, row, body)) for row, body in zip(rows, bodies, strict=True)]

    def _image(self, name: str, row: dict[str, Any], data: bytes) -> tuple[bytes, str]:
        extension = row["member"].rsplit(".", 1)[-1]
        try:
            found = sample.parse(data, (extension,))
            if found["__key__"] != row["key"]:
                raise sample.BadSampleError(f"holds {found['__key__']} there")
        except sample.BadSampleError as error:
            raise RunError(
                f"{self.folder.path(name)}.tar: sample {row['key']} is damaged ({error}); "
                "see `pairmill verify` for raw/, drop the shard and ingest it again"
            ) from None
        return found[extension], extension

    def _learn_anew(self, name: str) -> tuple[Kept, pa.Table, Reader]:
        one, table = index.build(self.folder, names=[name]), sidecar(self.corpus, name)
        kept = select(self.corpus, name, table)
        if one.samples != kept.successes:
            raise RunError(
                f"{self.folder.path(name)}.tar: {one.samples} samples where the sidecar has {kept.successes}; "
                "see `pairmill verify` for raw/, drop the shard and ingest it again"
            )
        keep = KeepList(kept.places, one.samples) if len(kept.places) else None
        return kept, table, Reader(self.folder, one, PATIENCE_S, kept=keep, buffers=self._buffers)
