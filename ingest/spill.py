"""A sort of more rows than memory holds: sorted runs in one unnamed file, merged range by range."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shards.layout import ROW

ORDER = (":high", ":low")
"""Columns that rows are sorted by, before `row`; no input may have any of these names."""
RANGES = 4096
"""Equal ranges of the first order column; a merge reads at least one of them from every run."""
_RANGE_BITS = 12


@dataclass(frozen=True)
class _Run:
    start: int
    end: int
    bounds: npt.NDArray[np.int64]  # [RANGES + 1], first row of each range


class SortedRuns:
    """Rows with the columns `ORDER` (uint64) and `row` (int64), given in any order, come back sorted by them.

    The file has no name: a killed process leaves nothing behind.
    """

    def __init__(self, folder: str | None = None) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder, prefix=".tmp-sort-")  # noqa: SIM115 (held open)
        self._runs: list[_Run] = []

    def add(self, table: pa.Table) -> None:
        """Sort one run in memory and put it away. Raises OSError when the disk is full."""
        table = _sorted(table)
        high = table[ORDER[0]].to_numpy()
        edges = (np.arange(RANGES, dtype=np.uint64) << np.uint64(64 - _RANGE_BITS)).astype(np.uint64)
        bounds = np.append(np.searchsorted(high, edges), len(high)).astype(np.int64)
        start = self._file.seek(0, 2)
        with pa.ipc.new_stream(pa.PythonFile(self._file, mode="w"), table.schema) as writer:
            writer.write_table(table.combine_chunks())
        self._file.flush()
        self._runs.append(_Run(start, self._file.tell(), bounds))

    def merged(self, rows_at_once: int) -> Iterator[pa.Table]:
        """Yield all rows in order, in tables of about `rows_at_once`; equal orders never straddle two tables."""
        if not self._runs:
            return
        mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)  # closed when no table needs it
        data = pa.py_buffer(mapped)
        tables = [
            pa.ipc.open_stream(pa.BufferReader(data.slice(run.start, run.end - run.start))).read_all()
            for run in self._runs
        ]
        for first, last in self._spans(rows_at_once):
            parts = [
                table.slice(int(run.bounds[first]), int(run.bounds[last] - run.bounds[first]))
                for table, run in zip(tables, self._runs, strict=True)
            ]
            yield _sorted(pa.concat_tables(parts))

    def close(self) -> None:
        """Give the disk space back."""
        self._file.close()

    def _spans(self, rows_at_once: int) -> Iterator[tuple[int, int]]:
        totals = np.sum([run.bounds for run in self._runs], axis=0)
        first = 0
        for last in range(1, RANGES + 1):
            full = last == RANGES or totals[last + 1] - totals[first] > rows_at_once
            if full and totals[last] > totals[first]:
                yield first, last
                first = last


def _sorted(table: pa.Table) -> pa.Table:
    order = np.lexsort([table[name].to_numpy() for name in (ROW, *reversed(ORDER))])
    return table.take(pa.array(order))
