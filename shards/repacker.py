"""The worker of `repack`: selects the kept samples of a raw shard, and writes one final shard."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from infra.errors import RunError, UserError
from infra.storage import Folder
from shards import index, sample, tombstones
from shards.buffers import BufferPool
from shards.kept import KeepList
from shards.layout import FINAL, RAW, SIDECAR, SOURCE_KEY, sample_key, shard_name
from shards.order import Order
from shards.reads import PATIENCE_S, Reader
from shards.selection import Kept, select, sidecar
from shards.tombstones import Removed
from shards.writer import writing

RawSample = tuple[dict[str, Any], bytes | None, str]
"""Sidecar row, picture (None for one that was taken down) and its extension."""
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
        self._taken = tombstones.all_removed(self.corpus)
        self._raw = _RawShards(self.corpus, self._taken)

    def run(self, task: tuple[str, int, str]) -> dict[str, Any]:
        """Do `("select", number, raw shard)` or `("write", number, final shard)`.

        Raises:
            RunError: a raw shard is damaged or the disk is full; the message names it.
        """
        what, number, name = task
        if what == "select":
            found = select(self.corpus, name, taken=self._taken)
            return {
                "kept": len(found.rows), "holes": found.holes, "digest": found.digest(), "removed": found.removed
            }  # fmt: skip
        return self._write(number)

    def _write(self, number: int) -> dict[str, Any]:
        layout = self.layout
        assert layout is not None
        first, stop = layout.bounds(number)
        more = {"layout": layout.digest}
        with writing(self.corpus / FINAL, shard_name(number), self._schema(layout), more) as writer:
            for row, (fields, image, extension) in enumerate(self._samples(layout, first, stop)):
                fields |= {SOURCE_KEY: fields["key"], "key": sample_key(number, row)}
                if image is None:
                    writer.add_hole(fields)
                else:
                    writer.add(fields, image, extension)
            return {"successes": writer.stats()["successes"]}

    def _schema(self, layout: Layout) -> pa.Schema:
        told = sidecar(self.corpus, layout.names[0]).schema
        schema = pa.schema([one if one.name in SIDECAR.names else one.with_nullable(True) for one in told])
        if SOURCE_KEY in schema.names:
            raise UserError(f"{self.corpus.url}: the input has a column '{SOURCE_KEY}'; rename it and plan again")
        return schema.append(pa.field(SOURCE_KEY, pa.string(), nullable=False))

    def _samples(self, layout: Layout, first: int, stop: int) -> Iterator[RawSample]:
        """Yield samples `[first, stop)` of the final order.

        Held in memory: the runs of one window, at most `BLOCK_SAMPLES * WINDOW_BLOCKS` samples.
        """
        starts = np.concatenate([[0], np.cumsum(layout.kept)])
        held: OrderedDict[int, tuple[int, int, list[RawSample]]] = OrderedDict()
        for step in layout.order().walk(0, first, stop):
            run, begin, number = int(step.run[0]), int(step.first[0]), int(step.sample[0])
            if run not in held:
                for old in [name for name, (_, until, _) in held.items() if until < step.step]:
                    del held[old]
                held[run] = (begin, int(step.until[0]), self._run(layout, starts, begin, int(step.stop[0])))
            yield held[run][2][number - begin]

    def _run(self, layout: Layout, starts: npt.NDArray[np.int64], first: int, stop: int) -> list[RawSample]:
        """Read the kept samples `[first, stop)`, counted over all raw shards in their order."""
        out: list[RawSample] = []
        while first < stop:
            place = int(np.searchsorted(starts, first, side="right")) - 1
            end = min(stop, int(starts[place + 1]))
            begin = int(starts[place])
            out += self._raw.samples(layout.names[place], first - begin, end - begin, layout.kept[place])
            first = end
        return out


class _RawShards:
    """Reads kept samples of raw shards; what was learnt of the last few shards is kept."""

    def __init__(self, corpus: Folder, taken: Mapping[str, Removed] | None = None) -> None:
        self.corpus, self.folder, self._buffers, self._taken = corpus, corpus / RAW, BufferPool(), taken
        self._learn = functools.lru_cache(maxsize=RAW_SHARDS_HELD)(self._learn_anew)

    def samples(self, name: str, first: int, stop: int, expected: int) -> list[RawSample]:
        """Return kept samples `[first, stop)` of a raw shard.

        Where little lies between them it is one read; what lies between is not held.

        Raises:
            RunError: the shard is damaged, or changed since its samples were counted.
        """
        kept, table, reader = self._learn(name)
        if len(kept.rows) != expected:
            raise RunError(f"{self.folder.path(name)}: changed while repack was at work; run it again")
        places = kept.in_tar[first:stop].tolist()
        there = [place for place in places if place >= 0]
        bodies: dict[int, bytes] = {}
        for piece in reader.read(there[0], there[-1] + 1) if there else ():
            if piece.fault is not None:
                raise piece.fault
            end = piece.first + len(piece.ends)
            bodies |= {place: piece.sample(place) for place in there if piece.first <= place < end}
        rows = table.take(pa.array(kept.rows[first:stop])).to_pylist()
        return [
            (row, None, "") if place < 0 else (row, *self._image(name, row, bodies[place]))
            for row, place in zip(rows, places, strict=True)
        ]

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
        kept = select(self.corpus, name, table, self._taken)
        if one.samples != kept.tar_samples:
            raise RunError(
                f"{self.folder.path(name)}.tar: {one.samples} samples where the sidecar has {kept.tar_samples}; "
                "see `pairmill verify` for raw/, drop the shard and ingest it again"
            )
        there = kept.in_tar[kept.in_tar >= 0]
        keep = KeepList(there, one.samples) if len(there) else None
        return kept, table, Reader(self.folder, one, PATIENCE_S, kept=keep, buffers=self._buffers)
