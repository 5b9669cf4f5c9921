"""The work of a take-down, shard by shard: which shards and parts hold what goes, and what is done to each."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dedup.signature import drop_signatures
from infra.storage import Folder
from shards.layout import (
    DEDUP,
    EARLIER_REASON,
    EARLIER_STATUS,
    FINAL,
    PLAN,
    RAW,
    RETRY,
    SIGNATURES,
    key_address,
    part_name,
    part_number,
    shard_name,
)
from shards.remove import take_out
from shards.scrub import scrub
from shards.tombstones import Tombstone
from shards.writer import committed

Task = tuple[str, str, tuple[str, ...]]
"""A stage, a shard's name or, in the plan, a part's, and the keys there of what goes."""


def tasks_of(corpus: Folder, tombstone: Tombstone) -> list[Task]:
    """Return what is to be done for a tombstone, a task for each shard and part that holds rows of what goes.

    A row that was tried again is in several: where it failed it has an address and a caption too.
    """
    keys: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    wanted = pa.array([one.key for one in tombstone.removed], pa.string())
    rows = [(key_address(one.key)[0], one.key) for one in tombstone.removed]
    retries = corpus / RAW / RETRY
    for name in retries.names(".parquet"):
        there = pq.read_table(io.BytesIO(retries.read(name)), columns=["key"])["key"]
        rows += [(part_number(name), key) for key in there.filter(pc.is_in(there, wanted)).to_pylist()]
    raw, final = set(committed(corpus / RAW)), set(committed(corpus / FINAL))
    parts = {*(corpus / PLAN).names(".parquet"), *retries.names(".parquet")}
    for number, key in rows:
        if shard_name(number) in raw:
            keys[RAW, shard_name(number)].append(key)
        if part_name(number) in parts:
            keys[PLAN, part_name(number)].append(key)
    for one in tombstone.removed:
        if one.shard in raw and one.key not in keys[RAW, one.shard]:
            keys[RAW, one.shard].append(one.key)
        if one.final is not None and one.final_shard in final:
            keys[FINAL, one.final_shard].append(one.final)
    return [(stage, name, tuple(some)) for (stage, name), some in sorted(keys.items()) if some]


class TakeDown:
    """Does one task after the other; a Ray actor holds one."""

    def __init__(self, corpus: str, detail: str) -> None:
        """`detail` is what the rows will say of why they are empty."""
        self.corpus, self.detail = Folder(corpus), detail

    def run(self, task: Task) -> list[int]:
        """Do one task; return the places among the shard's samples that became holes.

        Raises:
            RunError: the shard is damaged.
        """
        stage, name, keys = task
        if stage == PLAN:
            _scrub_part(self.corpus, name, keys)
            return []
        places = take_out(self.corpus / stage, name, keys, self.detail)
        if stage == RAW and places and (self.corpus / DEDUP / SIGNATURES).exists(f"{name}.parquet"):
            drop_signatures(self.corpus, name, keys)
        return places


def _scrub_part(corpus: Folder, name: str, keys: Sequence[str]) -> None:
    """Have a part of the plan, or of a pass over failed rows, keep nothing of these rows but their keys."""
    folder = corpus / PLAN if (corpus / PLAN).exists(name) else corpus / RAW / RETRY
    also_kept = () if folder.url.endswith(f"/{PLAN}") else (EARLIER_STATUS, EARLIER_REASON)
    table = pq.ParquetFile(io.BytesIO(folder.read(name))).read()
    rows = pc.is_in(table["key"], pa.array(keys, pa.string())).to_numpy()
    after = scrub(table, rows, also_kept)
    if not after.equals(table):
        buffer = io.BytesIO()
        pq.write_table(after.combine_chunks(), buffer, compression="zstd")
        folder.write(name, buffer.getvalue())
