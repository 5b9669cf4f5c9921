"""From rows to shard tasks: filtered, shuffled by a seeded hash of the URL, URL duplicates merged, cut into parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import UserError
from infra.lock import exclusive
from infra.logs import Meter, progress
from infra.storage import Folder, full_disk_is_named
from ingest.caption import caption_reason
from ingest.config import PlanConfig
from ingest.retry import EARLIER_REASON, EARLIER_STATUS
from ingest.sources import Columns, find_sources, read_rows
from ingest.spill import ORDER, SortedRuns
from ingest.urls import canonical, host_of, order_of
from shards.layout import MANIFEST, PLAN, ROW, Reason, Status, check_passthrough, part_name, sample_key
from shards.manifest import Manifest

PLANNED = "planned"
REJECTED = "rejected-00000.parquet"
_OURS = (*ORDER, EARLIER_STATUS, EARLIER_REASON)
_MAX_STRING_BYTES = 2**30  # of one run's text column, half of what 32-bit offsets reach


def plan(corpus: str, config: PlanConfig) -> dict[str, Any]:
    """Write `plan/` of a corpus: the candidate rows in their final order, one part for each shard.

    An input row ends in a part, or in the file of rejected rows with its reason. The order is that of a keyed
    hash of the canonical URL: a seeded shuffle in one external pass, which brings equal URLs side by side; of
    these the first in input order is kept. Same rows, same configuration: same bytes. An interrupted plan is
    made anew, a finished one is left as it is.

    Returns:
        `rows_in`, `rows_out`, `by_status`, `by_reason`, `parts`, `hosts`.

    Raises:
        UserError: the rows cannot be read, the corpus was planned otherwise, another process is at work on it.
        RunError: the disk is full.
    """
    folder = Folder(corpus)
    manifest = Manifest.open(folder)
    if manifest.is_done(PLAN):
        manifest.begin(PLAN, config)
        return manifest.totals(PLAN)
    sources = find_sources(config.urls)
    columns = Columns(config.url_col, config.caption_col, config.columns)
    captioned = config.caption_col is not None and any(source.format != "txt" for source in sources)
    batches = _checked_start(read_rows(sources, columns))
    with exclusive(folder):
        manifest = Manifest.open(folder)
        is_new = not manifest.config(PLAN)
        manifest.begin(PLAN, config)
        if manifest.is_done(PLAN):
            return manifest.totals(PLAN)
        try:
            totals = _Planner(folder / PLAN, config, captioned).run(batches)
        except UserError:
            if is_new:  # the mended command may have another configuration
                (folder / PLAN).delete_tree()
                folder.delete(MANIFEST)
            raise
        manifest.finish(PLAN, totals)
    return totals


def _checked_start(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Read the first batch before anything is written, so that a mistyped column leaves no trace of a corpus.

    Raises:
        UserError: as `read_rows`, or a column has a name that is the corpus' own.
    """
    first = next(batches)
    check_passthrough((name for name in first.schema.names if name not in ("url", "caption")), also=_OURS)

    def again() -> Iterator[pa.RecordBatch]:
        yield first
        yield from batches

    return again()


@dataclass
class _Planner:
    folder: Folder
    config: PlanConfig
    captioned: bool
    reasons: Counter[str] = field(default_factory=Counter)
    rows_in: int = 0
    hosts: _Distinct = field(default_factory=lambda: _Distinct())

    def run(self, batches: Iterator[pa.RecordBatch]) -> dict[str, Any]:
        self._start_anew()
        near = self.folder.path("") if self.folder.is_local else None
        with ExitStack() as stack:
            stack.enter_context(full_disk_is_named(near or "the temporary folder"))
            meter = stack.enter_context(progress("plan", None, "rows"))
            runs = SortedRuns(near)
            stack.callback(runs.close)
            rejected = stack.enter_context(_rejected_rows(self.folder))
            self._sort(batches, runs, rejected, meter)
            parts, rows_out = self._write_parts(runs, rejected)
            meter.advance(0, kept=rows_out, parts=parts)
        filtered = {Status.FILTERED.value: self.rows_in - rows_out} if self.rows_in > rows_out else {}
        return {
            "rows_in": self.rows_in,
            "rows_out": rows_out,
            "by_status": {PLANNED: rows_out, **filtered},
            "by_reason": dict(sorted(self.reasons.items())),
            "parts": parts,
            "hosts": self.hosts.count(),
        }

    def _start_anew(self) -> None:
        self.folder.sweep_temporary()
        for name in self.folder.names(".parquet"):
            self.folder.delete(name)
        if self.folder.is_local:
            Path(self.folder.url).mkdir(parents=True, exist_ok=True)

    def _sort(self, batches: Iterator[pa.RecordBatch], runs: SortedRuns, rejected: _Rejected, meter: Meter) -> None:
        waiting: list[pa.Table] = []
        rows = size = 0
        for batch in batches:
            kept = self._filter(pa.Table.from_batches([batch]), rejected)
            waiting.append(kept)
            rows, size = rows + kept.num_rows, size + kept.nbytes
            if rows >= self.config.sort_rows or size >= _MAX_STRING_BYTES:
                runs.add(pa.concat_tables(waiting))
                waiting, rows, size = [], 0, 0
            meter.advance(batch.num_rows)
        if rows:
            runs.add(pa.concat_tables(waiting))

    def _filter(self, table: pa.Table, rejected: _Rejected) -> pa.Table:
        """Return the rows worth a download, with `row` and `ORDER`; the others go to the rejected file."""
        first, count = self.rows_in, table.num_rows
        self.rows_in += count
        table = table.append_column(ROW, pa.array(range(first, first + count), pa.int64()))
        reasons, high, low = [""] * count, np.zeros(count, np.uint64), np.zeros(count, np.uint64)
        hosts: set[str] = set()
        texts = zip(table["url"].to_pylist(), table["caption"].to_pylist(), strict=True)
        for at, (url, caption) in enumerate(texts):
            address = canonical(url)
            if address is None:
                reasons[at] = Reason.BAD_URL
            elif self.captioned:
                reasons[at] = caption_reason(caption, self.config.captions)
            if address is not None and not reasons[at]:
                high[at], low[at] = order_of(address, self.config.seed)
                hosts.add(host_of(address) or "")
        self.hosts.add(hosts)
        keep = np.array([not reason for reason in reasons], dtype=bool)
        if not keep.all():
            drop = pa.array(~keep)
            self._reject(table.filter(drop), [reason for reason in reasons if reason], rejected)
        for name, values in zip(ORDER, (high, low), strict=True):
            table = table.append_column(name, pa.array(values))
        return table.filter(pa.array(keep))

    def _reject(self, table: pa.Table, reasons: list[str], rejected: _Rejected) -> None:
        self.reasons.update(str(reason) for reason in reasons)
        rejected.add(table.append_column("reason", pa.array([str(reason) for reason in reasons], pa.string())))

    def _write_parts(self, runs: SortedRuns, rejected: _Rejected) -> tuple[int, int]:
        """Merge the runs, drop repeated URLs, write the parts; return how many parts and rows."""
        size, parts, rows_out = self.config.rows_per_shard, 0, 0
        waiting: pa.Table | None = None
        for table in runs.merged(max(size, self.config.sort_rows)):
            unique = self._first_of_each(table, rejected).drop_columns(list(ORDER))
            waiting = unique if waiting is None else pa.concat_tables([waiting, unique])
            whole = waiting.num_rows // size
            for at in range(whole):
                rows_out += self._write_part(parts, waiting.slice(at * size, size))
                parts += 1
            waiting = waiting.slice(whole * size).combine_chunks()
        if waiting is not None and waiting.num_rows:
            rows_out += self._write_part(parts, waiting)
            parts += 1
        return parts, rows_out

    def _first_of_each(self, table: pa.Table, rejected: _Rejected) -> pa.Table:
        high, low = (table[name].to_numpy() for name in ORDER)
        same = np.zeros(len(high), dtype=bool)
        same[1:] = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
        if same.any():
            repeated = table.filter(pa.array(same)).drop_columns(list(ORDER))
            self._reject(repeated, [Reason.DUPLICATE_URL] * repeated.num_rows, rejected)
            table = table.filter(pa.array(~same))
        return table

    def _write_part(self, number: int, table: pa.Table) -> int:
        keys = pa.array([sample_key(number, row) for row in range(table.num_rows)], pa.string())
        captions = table["caption"].fill_null("")
        ordered = {"key": keys, "url": table["url"], "caption": captions, ROW: table[ROW]}
        ordered |= {name: table[name] for name in table.column_names if name not in ordered}
        with self.folder.create(part_name(number)) as stream:
            pq.write_table(pa.table(ordered).combine_chunks(), stream, compression="zstd")
        return table.num_rows


class _Distinct:
    """How many different names there are, at some 8 bytes for each."""

    def __init__(self) -> None:
        self._known = np.empty(0, np.uint64)
        self._new: list[np.ndarray] = []

    def add(self, names: set[str]) -> None:
        self._new.append(np.array([order_of(name, 0)[0] for name in names], dtype=np.uint64))
        if sum(map(len, self._new)) > max(2**16, len(self._known) // 4):  # a merge costs as much as all that is known
            self.count()

    def count(self) -> int:
        self._known = np.unique(np.concatenate([self._known, *self._new]))
        self._new = []
        return len(self._known)


class _Rejected:
    """The rejected rows' file, opened when the first of them gives the schema."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._writer: pq.ParquetWriter | None = None

    def add(self, table: pa.Table) -> None:
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._stream, table.schema, compression="zstd")
        self._writer.write_table(table)

    def close(self) -> None:
        if self._writer is None:
            empty = {"url": pa.string(), "caption": pa.string(), ROW: pa.int64(), "reason": pa.string()}
            self._writer = pq.ParquetWriter(self._stream, pa.schema(empty))
        self._writer.close()


@contextmanager
def _rejected_rows(folder: Folder) -> Iterator[_Rejected]:
    with folder.create(REJECTED) as stream:
        rejected = _Rejected(stream)
        yield rejected
        rejected.close()
