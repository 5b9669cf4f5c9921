"""One part of the plan, or of a pass over failed rows, as the maker of its shard needs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from infra.storage import Folder
from ingest.retry import is_again, read_part, superseded, taken_over
from shards.layout import EARLIER_REASON, EARLIER_STATUS, sidecar_schema


@dataclass(frozen=True)
class Part:
    """Input rows in their order, and the schema of the sidecar to be.

    `supersedes` are the counts of what these rows ended as before, empty for a part of the plan. `elsewhere` are
    rows, by key, that a later pass has taken up, with the (status, reason) they had in this part's first shard.
    """

    number: int
    rows: list[dict[str, Any]]
    schema: pa.Schema
    supersedes: dict[str, Any]
    elsewhere: dict[str, tuple[str, str]]


def read(corpus: Folder, number: int) -> Part:
    """Read part `number`. Raises RunError if it is missing or damaged."""
    table = read_part(corpus, number)
    supersedes: dict[str, Any] = {}
    if is_again(corpus, number):  # by its number: a column of the input may have any name
        supersedes = superseded(table)
        table = table.drop_columns([EARLIER_STATUS, EARLIER_REASON])
    # Nullable, whatever the input says: a row that is taken down keeps nothing of them.
    others = pa.schema([one.with_nullable(True) for one in table.schema if one.name not in ("key", "url", "caption")])
    return Part(number, table.to_pylist(), sidecar_schema(others), supersedes, taken_over(corpus, number))
