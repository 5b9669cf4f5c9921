"""An index with a flipped bit, or with values that are none: refused in one line, named, and made anew."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import shards
from infra.errors import UserError
from infra.storage import Folder
from shards import entries, index
from shards.layout import INDEX
from shards.repair import repair
from shards.stream import ShardStream
from shards.verify import verify

Table = Callable[[pa.Table], pa.Table]


def content(folder: Folder) -> tuple[list[index.Shard], list[list[int]]]:
    found = index.load(folder)
    return found.shards, [found.ends(number).tolist() for number in range(len(found.shards))]


def test_a_flipped_bit_is_refused_or_changes_nothing(own_shards: Folder) -> None:
    whole, source = content(own_shards), own_shards.read(INDEX)
    path, refused = Path(own_shards.path(INDEX)), 0
    for at in range(0, len(source), 7):
        flipped = bytearray(source)
        flipped[at] ^= 1 << at % 8
        path.write_bytes(flipped)
        try:
            assert content(own_shards) == whole, at
        except UserError as error:
            refused += "\n" not in str(error)
    assert refused > len(source) // 14


def column(name: str, make: Callable[[list[Any]], pa.Array]) -> Table:
    """Put another column in the place of one."""

    def change(table: pa.Table) -> pa.Table:
        place = table.schema.get_field_index(name)
        made = make(table.column(name).to_pylist())
        return table.set_column(place, pa.field(name, made.type), made)

    return change


def without_last(values: list[Any]) -> list[Any]:
    return [*values[:-1], None]


WRONG: dict[str, tuple[Table, str]] = {
    "null ends": (column("ends", lambda v: pa.array(without_last(v), pa.list_(pa.int64()))), "for 2 of 3 shards"),
    "ends that are all null": (column("ends", lambda v: pa.nulls(len(v))), "column ends is of type null"),
    "null in ends": (
        column("ends", lambda v: pa.array([*v[:-1], without_last(v[-1])], pa.list_(pa.int64()))), "that are null"),
    "ends that are text": (
        column("ends", lambda v: pa.array([list(map(str, one)) for one in v])), "column ends is of type list"),
    "ends that are no lists": (column("ends", lambda v: pa.array([1] * len(v))), "column ends is of type int64"),
    "null samples": (column("samples", lambda v: pa.array(without_last(v))), "column samples has nulls"),
    "samples that are text": (column("samples", lambda v: pa.array(list(map(str, v)))), "samples is of type str"),
    "null shard": (column("shard", lambda v: pa.array(without_last(v))), "column shard has nulls"),
    "shard that is a number": (column("shard", lambda v: pa.array(range(len(v)))), "column shard is of type int64"),
    "null tar_bytes": (column("tar_bytes", lambda v: pa.array(without_last(v))), "column tar_bytes has nulls"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_values_that_are_none_are_refused_named_and_mended(own_shards: Folder, name: str) -> None:
    change, words = WRONG[name]
    whole, out = content(own_shards), io.BytesIO()
    pq.write_table(change(index.load(own_shards).table(0, 64)).replace_schema_metadata(entries.SCHEMA.metadata), out)
    own_shards.write(INDEX, out.getvalue())
    for read in (
        lambda: list(ShardStream(own_shards, global_batch_size=4)),
        lambda: [shards.open(own_shards.url)[at] for at in (0, -1)],
    ):
        with pytest.raises(UserError, match=f"index.parquet: .*{words}.*build (it|the index) anew"):
            read()
    report = verify(own_shards)
    assert {fault.kind for fault in report.faults} == {"index"}
    assert any(words in fault.what for fault in report.faults)
    repair(report)
    assert verify(own_shards).ok
    assert content(own_shards) == whole


def test_damage_in_the_addresses_alone_is_named_and_mended(own_shards: Folder) -> None:
    whole, source = content(own_shards), own_shards.read(INDEX)
    ends = pq.ParquetFile(io.BytesIO(source)).metadata.row_group(0).column(7)
    for at in (ends.data_page_offset + 2, ends.data_page_offset + ends.total_compressed_size - 9):
        flipped = bytearray(source)
        flipped[at] ^= 1
        own_shards.write(INDEX, bytes(flipped))
        with pytest.raises(UserError, match=r"index\.parquet: the addresses of shard 00000 cannot be read"):
            list(ShardStream(own_shards, global_batch_size=4))
        report = verify(own_shards)
        assert {(fault.shard, fault.kind) for fault in report.faults} == {(f"0000{n}", "index") for n in range(3)}
        repair(report)
        assert verify(own_shards).ok
        assert content(own_shards) == whole


def test_columns_of_kindred_types_are_read(own_shards: Folder) -> None:
    whole = content(own_shards)
    table = index.load(own_shards).table(0, 64)
    types = {"samples": pa.int64(), "tar_sha256": pa.large_string(), "ends": pa.large_list(pa.uint32())}
    table = table.cast(pa.schema([pa.field(one.name, types.get(one.name, one.type)) for one in table.schema]))
    table = table.set_column(5, "sidecar_bytes", pa.nulls(3)).replace_schema_metadata(entries.SCHEMA.metadata)
    pq.write_table(table, own_shards.path(INDEX))
    found = content(own_shards)
    assert found[1] == whole[1]
    assert [shard.sidecar_bytes for shard in found[0]] == [None] * 3
