"""A pass over what failed and may do better: those rows alone, under their own keys, into new shards.

`raw/retry/` holds the passes: their parts, numbered on from the plan's, and `pass-00001.json`, which says which
parts a pass has and is written last. A row that was tried again has two rows in the sidecars; the one in the
shard of the higher number counts.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.errors import RunError, UserError
from infra.storage import Folder
from shards.layout import (
    EARLIER_REASON,
    EARLIER_STATUS,
    PLAN,
    RAW,
    RETRY,
    SIDECAR,
    Status,
    part_name,
    part_number,
    shard_name,
)


@dataclass(frozen=True)
class Pass:
    """One pass: parts `[first, first + parts)`, made of the transient failures in the shards `[since, first)`."""

    first: int
    parts: int
    rows: int
    since: int


def passes(corpus: Folder) -> list[Pass]:
    """Return the passes of a corpus so far, in their order."""
    folder = corpus / RAW / RETRY
    return [Pass(**folder.read_json(name)) for name in folder.names(".json")]


def plan_pass(corpus: Folder, planned_parts: int, rows_per_shard: int) -> Pass | None:
    """Write the parts of another pass; None when no row failed in a way that another try may mend.

    Only what came after the last pass is looked through: all there was before, that pass has taken up.

    Raises:
        UserError: the raw shards have been removed.
    """
    before = passes(corpus)
    since = before[-1].first if before else 0
    first = before[-1].first + before[-1].parts if before else planned_parts
    folder = corpus / RAW / RETRY
    if not (corpus / RAW).exists(f"{shard_name(since)}.parquet"):
        raise UserError(f"{(corpus / RAW).url}: its shards were removed, and with them what is known of failures")
    for name in folder.names(".parquet"):  # of a pass that was interrupted while it was planned
        if part_number(name) >= first:
            folder.delete(name)
    parts = rows = 0
    for table in _whole_parts(_failed(corpus, since, first), rows_per_shard):
        with folder.create(part_name(first + parts)) as stream:
            pq.write_table(table, stream, compression="zstd")
        parts, rows = parts + 1, rows + table.num_rows
    if not parts:
        return None
    found = Pass(first, parts, rows, since)
    folder.write_json(f"pass-{len(before) + 1:05d}.json", vars(found))
    return found


def is_again(corpus: Folder, part: int) -> bool:
    """Tell whether a part is one of a pass, and not of the plan."""
    return any(one.first <= part < one.first + one.parts for one in passes(corpus))


def superseded(table: pa.Table) -> dict[str, Any]:
    """Return what a retry part's rows were counted as before, for the commit of the shard made of them."""
    statuses = Counter(table[EARLIER_STATUS].to_pylist())
    reasons = Counter(reason for reason in table[EARLIER_REASON].to_pylist() if reason)
    return {"by_status": dict(sorted(statuses.items())), "by_reason": dict(sorted(reasons.items()))}


def taken_over(corpus: Folder, part: int) -> dict[str, tuple[str, str]]:
    """Return the rows of a shard that a pass has taken up since: (status, reason) they had here, by key.

    A shard that has gone and is made anew leaves them as they were: they count elsewhere.
    """
    folder, found = corpus / RAW / RETRY, {}
    for one in passes(corpus):
        if not one.since <= part < one.first:
            continue
        keys = read_part(corpus, part)["key"]
        for number in range(one.first, one.first + one.parts):
            columns = ["key", EARLIER_STATUS, EARLIER_REASON]
            table = pq.read_table(io.BytesIO(folder.read(part_name(number))), columns=columns)
            for row in table.filter(pc.is_in(table["key"], keys.combine_chunks())).to_pylist():
                found[row["key"]] = (row[EARLIER_STATUS], row[EARLIER_REASON])
    return found


def read_part(corpus: Folder, part: int) -> pa.Table:
    """Return the rows of a part, of the plan's or of a pass.

    Raises:
        RunError: it is missing or damaged.
    """
    name = part_name(part)
    path = (corpus / PLAN).path(name)
    try:
        try:
            data = (corpus / PLAN).read(name)
        except FileNotFoundError:
            data = (corpus / RAW / RETRY).read(name)
            path = (corpus / RAW / RETRY).path(name)
        return pq.read_table(io.BytesIO(data))
    except FileNotFoundError:
        raise RunError(f"{path}: is missing; plan the corpus anew") from None
    except (OSError, pa.ArrowException) as error:
        what = " ".join(str(error).split())[:200]
        raise RunError(f"{path}: damaged, cannot be read as parquet: {what}; plan anew") from None


def _failed(corpus: Folder, since: int, stop: int) -> Iterator[pa.Table]:
    """Yield the rows of shards `[since, stop)` that failed and may do better, as they stood in their part."""
    raw = corpus / RAW
    for number in range(since, stop):
        table = pq.read_table(io.BytesIO(raw.read(f"{shard_name(number)}.parquet")))
        failed = pc.equal(table["status"], Status.FAILED_TO_DOWNLOAD.value)
        table = table.filter(pc.and_(failed, pc.fill_null(table["transient"], False)))
        if table.num_rows:
            passed_through = [name for name in table.column_names if name not in SIDECAR.names]
            earlier = {EARLIER_STATUS: table["status"], EARLIER_REASON: table["reason"]}
            rows = table.select(["key", "url", "caption", *passed_through]).replace_schema_metadata()
            for name, column in earlier.items():
                rows = rows.append_column(name, column)
            yield rows


def _whole_parts(tables: Iterator[pa.Table], rows_per_shard: int) -> Iterator[pa.Table]:
    """Join and cut tables into ones of `rows_per_shard` rows, the last one shorter."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        while sum(one.num_rows for one in waiting) >= rows_per_shard:
            joined = pa.concat_tables(waiting).combine_chunks()
            yield joined.slice(0, rows_per_shard)
            waiting = [joined.slice(rows_per_shard)]
    if sum(one.num_rows for one in waiting):
        yield pa.concat_tables(waiting).combine_chunks()
