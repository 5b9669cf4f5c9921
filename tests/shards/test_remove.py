"""One shard without some of its samples: its size and addresses, who reads it how, and what verify makes of it."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from hypothesis import given
from hypothesis import strategies as st

import shards
from infra.errors import RunError, UserError
from infra.storage import Folder
from shards import index, kept
from shards.layout import INDEX, STATS_SUFFIX
from shards.placeholder import placeholder, removed_key
from shards.remove import take_out, update_index
from shards.sample import BadSampleError
from shards.scan import scan_ends
from shards.scrub import scrub, scrubbed
from shards.stream import ShardStream
from shards.tar import members
from shards.verify import verify
from train.data import captions

KEYS = ["000010000", "000010009", "000010028"]
"""The first sample of shard 1, one in the midst, the last."""


@pytest.fixture
def holed(own_shards: Folder) -> Folder:
    assert take_out(own_shards, "00001", KEYS, "tombstones/00001.jsonl") == [0, 7, 24]
    update_index(own_shards, ["00001"])
    return own_shards


def test_nothing_moves_and_verify_is_content(own_shards: Folder) -> None:
    before, samples = index.load(own_shards), list(shards.open(own_shards.url))
    others = {name: own_shards.read(name) for name in own_shards.names() if not name.startswith("00001")}
    take_out(own_shards, "00001", KEYS, "why")
    assert {fault.kind for fault in verify(own_shards).faults} == {"index"}
    update_index(own_shards, ["00001"])
    assert verify(own_shards).ok
    assert verify(own_shards, quick=True).ok
    after = index.load(own_shards)
    for number, (one, was) in enumerate(zip(after.shards, before.shards, strict=True)):
        assert (one.samples, one.first_sample, one.tar_bytes) == (was.samples, was.first_sample, was.tar_bytes)
        assert after.ends(number).tolist() == before.ends(number).tolist() == scan_ends(own_shards, one.name).tolist()
    assert after.shards[1].tar_sha256 != before.shards[1].tar_sha256
    assert {name: own_shards.read(name) for name in others if name != INDEX} | {INDEX: others[INDEX]} == others
    index_bytes = own_shards.read(INDEX)
    index.save(own_shards, index.build(own_shards))
    assert own_shards.read(INDEX) == index_bytes
    now = shards.open(own_shards.url)
    for number, one in enumerate(samples):
        if one["__key__"] in KEYS:
            with pytest.raises(BadSampleError, match="it was taken down"):
                now[number]
            with pytest.raises(BadSampleError, match="it was taken down"):
                now[one["__key__"]]
        else:
            assert now[number] == now[one["__key__"]] == one


def test_again_it_changes_no_byte(holed: Folder) -> None:
    before = {name: (holed.read(name), Path(holed.path(name)).stat().st_ino) for name in holed.names()}
    assert take_out(holed, "00001", KEYS, "another reason") == [0, 7, 24]
    assert {name: (holed.read(name), Path(holed.path(name)).stat().st_ino) for name in holed.names()} == before
    assert take_out(holed, "00001", ["000010010"], "another reason") == [8]
    reasons = {row["detail"] for row in rows(holed) if row["reason"] == "taken_down"}
    assert reasons == {"tombstones/00001.jsonl", "another reason"}
    assert holed.read_json("00001" + STATS_SUFFIX)["holes"] == 4


def rows(folder: Folder) -> list[dict[str, object]]:
    return pq.read_table(io.BytesIO(folder.read("00001.parquet"))).to_pylist()


def test_a_sample_that_lies_elsewhere_than_its_sidecar_says_is_not_overwritten(own_shards: Folder) -> None:
    table = pq.read_table(io.BytesIO(own_shards.read("00001.parquet")))
    rows = table.to_pylist()
    one, other = (row for row in rows if row["key"] in KEYS[:2])
    for column in ("offset", "size"):
        one[column], other[column] = other[column], one[column]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), buffer)
    own_shards.write("00001.parquet", buffer.getvalue())
    before = {name: own_shards.read(name) for name in own_shards.names() if name.startswith("00001")}
    with pytest.raises(RunError, match=f"where its sidecar has sample {KEYS[0]} lies another"):
        take_out(own_shards, "00001", KEYS[:1], "tombstones/00001.jsonl")
    assert {name: own_shards.read(name) for name in before} == before


def test_foreign_readers_go_by_it(holed: Folder) -> None:
    there = [one["__key__"] for one in wds.WebDataset(holed.path("00001.tar"), shardshuffle=False)]
    assert len(there) == 25 - 3
    assert not set(there) & set(KEYS)


def test_positions_of_what_goes_by_position(holed: Folder, tmp_path: Path) -> None:
    """Captions of training by number, keep lists by key, a scan where the sidecar is gone."""
    texts = captions(holed.url)
    assert len(texts) == index.load(holed).samples
    first = index.load(holed).shards[1].first_sample
    assert [texts[first + place] for place in (0, 7, 24)] == ["", "", ""]
    assert texts[first + 8] == "picture 10 of shard 1, señor"
    (tmp_path / "keep").write_text("000010011\n000010010\n")
    keep = kept.load(tmp_path / "keep", holed, index.load(holed))
    chosen = [shards.open(holed.url)[number]["__key__"] for number in keep.between(0, 64)]
    assert chosen == ["000010010", "000010011"]
    ends = index.build(holed).ends(1).tolist()
    holed.delete("00001.parquet")
    assert index.build(holed, names=["00001"]).ends(0).tolist() == ends


def test_a_stream_counts_holes_whatever_it_needs(holed: Folder) -> None:
    for needs in ((), ("image", "txt"), ("json",)):
        stream = ShardStream(holed, global_batch_size=5, needs=needs, remainder="pad")
        keys = [one["__key__"] for batch in stream for one in batch]
        assert not set(keys) & set(KEYS)
        assert stream.holes >= 3


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda data, row: data, "was taken down in the tar or in the sidecar, and not in both"),
        (lambda data, row: data.replace(b"__removed__/000010009", b"__removed__/000010008"), "damaged tar"),
    ],
)
def test_verify_names_holes_that_do_not_agree(
    own_shards: Folder, damage: Callable[[bytes, int], bytes], told: str
) -> None:
    was = own_shards.read("00001.parquet")
    take_out(own_shards, "00001", KEYS, "why")
    if told.startswith("was"):
        own_shards.write("00001.parquet", was)
    own_shards.write("00001.tar", damage(own_shards.read("00001.tar"), 8))
    faults = verify(own_shards).faults
    assert any(told in fault.what for fault in faults), faults


def test_a_commit_that_counts_other_holes_is_a_fault(holed: Folder) -> None:
    holed.write_json("00001" + STATS_SUFFIX, holed.read_json("00001" + STATS_SUFFIX) | {"holes": 2})
    assert any("counts 2 samples taken down, the tar 3" in fault.what for fault in verify(holed).faults)
    assert any("samples: 25" in fault.what for fault in verify(holed, quick=True).faults)


def test_a_folder_without_an_index_needs_none(own_shards: Folder) -> None:
    own_shards.delete(INDEX)
    take_out(own_shards, "00001", KEYS, "why")
    update_index(own_shards, ["00001"])
    assert not own_shards.exists(INDEX)
    with pytest.raises(UserError, match="no such index"):
        index.load(own_shards)


@given(st.integers(1, 40), st.integers(0, 10**9))
def test_a_placeholder_is_one_member_of_its_size(blocks: int, number: int) -> None:
    data = placeholder(f"{number:09d}", 512 * blocks)
    (member,) = members(data)
    assert (len(data), member.end, removed_key(member.name)) == (512 * blocks, 512 * blocks, f"{number:09d}")


@pytest.mark.parametrize("name", ["000010008.jpg", "__removed__/", "__removed__/a/b", "x/__removed__/a", "removed"])
def test_other_names_are_none(name: str) -> None:
    assert removed_key(name) is None


@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_scrubbing_leaves_the_other_rows_as_they_are(which: list[bool]) -> None:
    told = [
        {"key": f"{number:09d}", "url": "u", "caption": "c", "status": "success", "boxes": [[0.5, number]],
         "at": number, "row": number, "sha256": "s"}
        for number in range(len(which))
    ]  # fmt: skip
    table = pa.Table.from_pylist(told)
    after = scrub(table, pa.array(which).to_numpy(zero_copy_only=False)).to_pylist()
    for row, was, there in zip(after, told, which, strict=True):
        assert row == (scrubbed(was) if there else was)
        assert not there or row == {
            "key": was["key"], "url": "", "caption": "", "status": "success", "boxes": None, "at": None,
            "row": was["row"], "sha256": None,
        }  # fmt: skip
