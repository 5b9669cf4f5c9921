"""Take-down: what a list names goes from every folder, the rest stays where it is, to the byte."""

from __future__ import annotations

import hashlib
import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds

import shards
from dedup.config import DedupConfig
from dedup.run import dedup
from dedup.signature import load
from dedup.takedown import remove
from dedup.thresholds import SCHEMA as PAIRS_SCHEMA
from infra.cluster import session
from infra.errors import RunError, UserError
from infra.lock import exclusive
from infra.storage import Folder
from shards import tombstones
from shards.layout import DEDUP, FINAL, INDEX, PLAN, RAW, REMOVED, THRESHOLDS, part_name
from shards.manifest import Manifest
from shards.repack import RepackConfig, repack
from shards.repair import repair
from shards.sample import BadSampleError
from shards.verify import verify
from tests.dedup.conftest import LOCAL, SAMPLES_PER_FINAL_SHARD, SHARDS, body, row_of

Listed = Callable[..., str]
ROOT = Path(__file__).parents[2]
STAGES = (PLAN, RAW, f"{DEDUP}/signatures", DEDUP, FINAL)


def digests(corpus: Folder) -> dict[str, str]:
    """The digest of every file of every stage, and of the manifest."""
    found = {"corpus.json": hashlib.sha256(corpus.read("corpus.json")).hexdigest()}
    for stage in STAGES:
        folder = corpus / stage
        found |= {f"{stage}/{name}": hashlib.sha256(folder.read(name)).hexdigest() for name in folder.names()}
    return found


def sidecar(corpus: Folder, stage: str, shard: str) -> list[dict[str, Any]]:
    return pq.read_table(io.BytesIO((corpus / stage).read(f"{shard}.parquet"))).to_pylist()


def everything(corpus: Folder) -> bytes:
    """The bytes of all that lies in a corpus, tombstones too, parquet unpacked."""
    parts = []
    for stage in (*STAGES, "tombstones"):
        for name in (corpus / stage).names():
            data = (corpus / stage).read(name)
            parts.append(data)
            if name.endswith(".parquet"):
                parts.append(json.dumps(pq.read_table(io.BytesIO(data)).to_pylist(), default=str).encode())
    return b"".join(parts)


def gone(corpus: Folder) -> set[str]:
    return set(tombstones.all_removed(corpus))


@pytest.mark.parametrize("kind", ["url", "host", "key", "final", "sha256", "pdq"])
def test_each_kind_of_entry_takes_what_it_names(corpus: Folder, listed: Listed, kind: str) -> None:
    told, picture = row_of(2, 5)
    near = bytearray.fromhex(told["phash"])
    near[3] ^= 0b11
    final = next(row["key"] for one in range(6) for row in sidecar(corpus, FINAL, f"{one:05d}")
                 if row["source_key"] == told["key"])  # fmt: skip
    line = {
        "url": "url HTTP://host-1.example:80/2/5.png?a=1&b=2#part", "host": "host HOST-1.example",
        "key": f"key {told['key']}", "final": f"final {final}", "sha256": f"sha256 {told['sha256'].upper()}",
        "pdq": f"pdq {near.hex()} 2",
    }[kind]  # fmt: skip
    result = remove(corpus.url, listed("# what they wrote to us", line, ""), LOCAL, reason="a letter of 3 May")
    expected = {told["key"]}
    if kind == "host":
        expected = {row_of(shard, row)[0]["key"] for shard in range(SHARDS) for row in (1, 5, 9)}
    assert gone(corpus) == expected
    assert (result["samples"], result["unmatched"]) == (len(expected), [])
    for stage in (RAW, FINAL):
        assert verify(corpus / stage).faults == []
    left = everything(corpus)
    assert picture is not None
    for secret in (picture[:200], told["caption"].encode(), b"/2/5.png"):
        assert secret not in left
    (stone,) = (tombstones.read(corpus, number) for number in tombstones.numbers(corpus))
    assert (stone.reason, {one.matched.split()[0] for one in stone.removed}) == (
        "a letter of 3 May", {"key" if kind == "final" else kind},
    )  # fmt: skip
    assert stone.time.startswith("20")


def test_a_host_with_all_below_it(corpus: Folder, listed: Listed) -> None:
    assert remove(corpus.url, listed("host example"), LOCAL)["samples"] == 0
    assert remove(corpus.url, listed("host *.example"), LOCAL)["samples"] == SHARDS * 11


def test_a_distance_is_kept_to(corpus: Folder, listed: Listed) -> None:
    far = bytearray.fromhex(row_of(2, 5)[0]["phash"])
    far[3] ^= 0b111
    assert remove(corpus.url, listed(f"pdq {far.hex()} 2"), LOCAL)["samples"] == 0


def test_only_the_shards_concerned_change_and_others_stay_where_they_are(corpus: Folder, listed: Listed) -> None:
    before, inodes = digests(corpus), {name: Path(corpus.path(name)).stat().st_ino for name in digests(corpus)}
    samples = list(shards.open(corpus.url + "/final"))
    index_before = pq.read_table(io.BytesIO((corpus / FINAL).read(INDEX))).to_pylist()
    told, _ = row_of(2, 5)
    remove(corpus.url, listed(f"key {told['key']}"), LOCAL)

    after = digests(corpus)
    (place,) = (number for number, one in enumerate(samples) if json.loads(one["json"])["source_key"] == told["key"])
    final = f"{place // SAMPLES_PER_FINAL_SHARD:05d}"
    expected = {
        "corpus.json", f"plan/{part_name(2)}", "dedup/signatures/00002.parquet", f"final/{INDEX}",
        *(f"raw/00002{end}" for end in (".tar", ".parquet", "_stats.json")),
        *(f"final/{final}{end}" for end in (".tar", ".parquet", "_stats.json")),
    }  # fmt: skip
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == expected
    assert {name for name in after if Path(corpus.path(name)).stat().st_ino != inodes[name]} == expected

    left = shards.open(corpus.url + "/final")
    assert len(left) == len(samples)
    for number, one in enumerate(samples):
        if number == place:
            with pytest.raises(BadSampleError, match="taken down"):
                left[number]
        else:
            assert left[number] == one
    for one, was in zip(pq.read_table(io.BytesIO((corpus / FINAL).read(INDEX))).to_pylist(), index_before, strict=True):
        assert {**one, "tar_sha256": 0, "sidecar_bytes": 0, "sidecar_sha256": 0} == {
            **was, "tar_sha256": 0, "sidecar_bytes": 0, "sidecar_sha256": 0,
        }  # fmt: skip
    tars = [corpus.path(f"final/{number:05d}.tar") for number in range(6)]
    there = [one["__key__"] for one in wds.WebDataset(tars, shardshuffle=False)]
    assert there == [one["__key__"] for number, one in enumerate(samples) if number != place]


def test_the_accounting_adds_up_in_every_stage(corpus: Folder, listed: Listed) -> None:
    """Row 0 of shard 0 is a duplicate that dedup set aside, row 11 the one it went for."""
    table = pq.read_table(io.BytesIO((corpus / DEDUP).read(REMOVED))).to_pylist()
    assert {(row["key"], row["kept_key"]) for row in table} in (
        {("000000000", "000000011")}, {("000000011", "000000000")},
    )  # fmt: skip
    remove(corpus.url, listed("key 000000000", "key 000000011", "key 000010004"), LOCAL)
    manifest = Manifest.existing(corpus)
    raw, removed, final = (manifest.totals(stage) for stage in (RAW, DEDUP, FINAL))
    assert raw["by_status"] == {"failed_to_download": SHARDS, "filtered": 3, "success": 52}
    assert raw["by_reason"] == {"http_status": SHARDS, "taken_down": 3}
    for totals in (raw, removed, final):
        assert sum(totals["by_status"].values()) == totals["rows_in"]
    assert (removed["rows_in"], removed["kept"], removed["removed"]) == (52, 52, 0)
    assert (final["rows_in"], final["samples"], final["holes"]) == (52, 52, 2)
    rows = [row for shard in range(SHARDS) for row in sidecar(corpus, RAW, f"{shard:05d}")]
    assert len(rows) == raw["rows_in"]
    (row,) = (row for row in rows if row["key"] == "000010004")
    assert {name: value for name, value in row.items() if value not in (None, "")} == {
        "key": "000010004", "status": "filtered", "reason": "taken_down", "detail": "tombstones/00001.jsonl",
        "attempts": 1, "offset": row["offset"], "size": row["size"], "row": 16,
    }  # fmt: skip
    assert len(load(corpus.url, [f"{shard:05d}" for shard in range(SHARDS)])) == 52
    assert pq.read_table(io.BytesIO((corpus / DEDUP).read(REMOVED))).num_rows == 0


def test_what_dedup_set_aside_for_it_goes_with_it(corpus: Folder, listed: Listed) -> None:
    (row,) = pq.read_table(io.BytesIO((corpus / DEDUP).read(REMOVED))).to_pylist()
    where = listed(f"key {row['kept_key']}")
    assert {one["key"] for one in remove(corpus.url, where, LOCAL, dry_run=True)["going"]} == {
        row["key"], row["kept_key"],
    }  # fmt: skip
    remove(corpus.url, where, LOCAL)
    told = tombstones.all_removed(corpus)
    assert told[row["key"]].matched == f"duplicate of {row['kept_key']}, key {row['kept_key']}"
    assert (told[row["key"]].placed, told[row["kept_key"]].placed) == (False, True)
    final = Manifest.existing(corpus).totals(FINAL)
    assert (final["rows_in"], final["by_status"], final["holes"]) == (53, {"success": 53}, 1)
    assert all(verify(corpus / stage).ok for stage in (RAW, FINAL))


def test_one_that_dedup_set_aside_goes_alone(corpus: Folder, listed: Listed) -> None:
    (row,) = pq.read_table(io.BytesIO((corpus / DEDUP).read(REMOVED))).to_pylist()
    before = {name: digest for name, digest in digests(corpus).items() if name.startswith("final/")}
    remove(corpus.url, listed(f"key {row['key']}"), LOCAL)
    assert gone(corpus) == {row["key"]}
    assert {name: digest for name, digest in digests(corpus).items() if name.startswith("final/")} == before


def test_a_corpus_on_an_object_store(finished_once: Path, s3_url: str, listed: Listed) -> None:
    corpus, here = Folder(s3_url), Folder(finished_once)
    for stage in ("", *STAGES):
        for name in (here / stage if stage else here).names():
            if not name.startswith("."):
                (corpus / stage if stage else corpus).write(name, (here / stage if stage else here).read(name))
    before = digests(corpus)
    remove(corpus.url, listed("key 000020005"), LOCAL)
    assert gone(corpus) == {"000020005"}
    assert all(verify(corpus / stage).ok for stage in (RAW, FINAL))
    assert sum(digest != before[name] for name, digest in digests(corpus).items()) == 10


def test_a_dry_run_lists_and_changes_nothing(corpus: Folder, listed: Listed) -> None:
    before = digests(corpus)
    told, _ = row_of(2, 5)
    result = remove(corpus.url, listed(f"url {told['url']}", "host nowhere.example"), LOCAL, dry_run=True)
    (one,) = result["going"]
    assert (one["key"], one["raw_shard"], one["sha256"]) == (told["key"], "00002", told["sha256"])
    assert one["matched"] == f"url {told['url']}"
    assert one["final_key"].startswith(one["final_shard"])
    assert (result["samples"], result["unmatched"]) == (1, ["host nowhere.example"])
    assert (result["shards"], result["tombstone"]) == ({RAW: 1, FINAL: 1}, None)
    assert digests(corpus) == before
    assert not (corpus / "tombstones").exists()


def test_again_with_the_same_list_changes_nothing(corpus: Folder, listed: Listed) -> None:
    where = listed("host host-2.example", "final 000010003")
    remove(corpus.url, where, LOCAL)
    before, stones = digests(corpus), (corpus / "tombstones").names()
    assert remove(corpus.url, where, LOCAL)["tombstone"] is None
    assert (digests(corpus), (corpus / "tombstones").names()) == (before, stones)
    remove(corpus.url, listed("host host-2.example", "host host-3.example"), LOCAL)
    assert tombstones.numbers(corpus) == [1, 2]
    assert all(verify(corpus / stage).ok for stage in (RAW, FINAL))


KILLED = """
import os, signal, sys
from contextlib import contextmanager
from infra.storage import Folder
from infra.cluster import ClusterConfig
from dedup.takedown import remove
from dedup.thresholds import SCHEMA as PAIRS_SCHEMA
left, whole = int(sys.argv[3]), sys.argv[4] == "after"
create = Folder.create

@contextmanager
def killed(self, name):
    global left
    left -= 1
    if left < 0 and not whole:
        with create(self, name) as stream:
            yield stream
            stream.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    with create(self, name) as stream:
        yield stream
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)

Folder.create = killed
remove(sys.argv[1], sys.argv[2], ClusterConfig(cpus=1))
"""


@pytest.mark.parametrize(
    ("writes", "when"),
    [(0, "after"), (1, "after"), (4, "before"), (5, "after"), (18, "after")],
)
def test_killed_anywhere_and_repeated_it_ends_in_the_same_bytes(
    corpus: Folder, tmp_path: Path, listed: Listed, writes: int, when: str
) -> None:
    where = listed("host host-2.example", "key 000000011", "url " + row_of(3, 4)[0]["url"])
    other = Folder(tmp_path / "other")
    subprocess.run(["cp", "-a", corpus.url, other.url], check=True)
    remove(other.url, where, LOCAL)
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, corpus.url, where, str(writes), when], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert tombstones.open_number(corpus) == 1
    with pytest.raises(UserError, match="a removal was interrupted"):
        repack(corpus.url, RepackConfig(samples_per_shard=SAMPLES_PER_FINAL_SHARD, seed=1), LOCAL)
    assert remove(corpus.url, where, LOCAL)["samples"] == len(gone(other))
    assert digests(corpus) == digests(other)
    assert tombstones.numbers(corpus) == [1]
    assert tombstones.read(corpus, 1).removed == tombstones.read(other, 1).removed
    assert (corpus / "tombstones").read("00001_done.json") == (other / "tombstones").read("00001_done.json")
    assert all(verify(corpus / stage).ok for stage in (RAW, FINAL))


def test_repair_leaves_what_an_interrupted_removal_has_in_hand(corpus: Folder, listed: Listed) -> None:
    where = listed("key 000020005")
    arguments = [sys.executable, "-c", KILLED, corpus.url, where, "2", "after"]
    assert subprocess.run(arguments, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    reports = [report for stage in (RAW, FINAL) if (report := verify(corpus / stage)).faults]
    for report in reports:
        with pytest.raises(UserError, match="a removal was interrupted"):
            repair(report)
    assert reports
    remove(corpus.url, where, LOCAL)
    assert all(verify(corpus / stage).ok for stage in (RAW, FINAL))


def test_many_shards_go_to_ray_with_the_same_outcome(
    corpus: Folder, tmp_path: Path, listed: Listed, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, other = listed("host host-2.example"), Folder(tmp_path / "other")
    subprocess.run(["cp", "-a", corpus.url, other.url], check=True)
    remove(other.url, where, LOCAL)
    monkeypatch.setattr("dedup.spread.FEW_TASKS", 2)
    with session(LOCAL):
        remove(corpus.url, where, LOCAL)
    assert digests(corpus) == digests(other)


def test_a_damaged_shard_is_named_and_not_made_to_look_whole(corpus: Folder, listed: Listed) -> None:
    tar = Path(corpus.path("raw/00002.tar"))
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    with pytest.raises(RunError, match=r"raw/00002: this shard is damaged .*left as it is"):
        remove(corpus.url, listed("key 000020005"), LOCAL)
    assert tar.read_bytes() == bytes(data)
    data[600] ^= 1
    tar.write_bytes(data)
    remove(corpus.url, listed("key 000020005"), LOCAL)
    assert all(verify(corpus / stage).ok for stage in (RAW, FINAL))


def test_a_final_shard_made_again_has_the_hole_and_the_others_stay(corpus: Folder, listed: Listed) -> None:
    config = RepackConfig(samples_per_shard=SAMPLES_PER_FINAL_SHARD, seed=1)
    before = list(shards.open(corpus.url + "/final"))
    remove(corpus.url, listed("key 000020005", "key 000000000", "key 000040010"), LOCAL)
    totals = Manifest.existing(corpus).totals(FINAL)
    hole = tombstones.all_removed(corpus)["000020005"].final
    assert hole is not None
    kept = {name: digest for name, digest in digests(corpus).items() if not name.startswith(f"final/{hole[:-4]}")}
    for name in (f"{hole[:-4]}_stats.json", f"{hole[:-4]}.parquet", f"{hole[:-4]}.tar"):
        (corpus / FINAL).delete(name)
    with session(LOCAL):
        again = repack(corpus.url, config, LOCAL)
    assert {name: again[name] for name in ("rows_in", "samples", "holes")} == {
        name: totals[name] for name in ("rows_in", "samples", "holes")
    }
    after = digests(corpus)
    changed = {name for name, digest in kept.items() if after[name] != digest}
    assert changed <= {f"final/{INDEX}", "corpus.json"}
    assert all(verify(corpus / stage).ok for stage in (RAW, FINAL))
    left = shards.open(corpus.url + "/final")
    for number, one in enumerate(before):
        if json.loads(one["json"])["source_key"] not in gone(corpus):
            assert left[number] == one


def test_what_goes_while_final_is_being_written_keeps_the_place_it_would_get(corpus: Folder, listed: Listed) -> None:
    """But for a duplicate, which gets none."""
    (duplicate,) = pq.read_table(io.BytesIO((corpus / DEDUP).read(REMOVED)))["key"].to_pylist()
    key = sidecar(corpus, FINAL, "00005")[0]["source_key"]
    for name in ("00005_stats.json", "00005.parquet", "00005.tar"):
        (corpus / FINAL).delete(name)
    content = corpus.read_json("corpus.json")
    content["stages"][FINAL]["done"] = False
    corpus.write_json("corpus.json", content)
    remove(corpus.url, listed(f"key {key}", f"key {duplicate}"), LOCAL)
    told = tombstones.all_removed(corpus)
    assert {one.key: (one.final, one.placed) for one in told.values()} == {key: (None, True), duplicate: (None, False)}


def test_taken_down_before_repack_it_leaves_no_place(corpus: Folder, listed: Listed) -> None:
    content = corpus.read_json("corpus.json")
    (corpus / FINAL).delete_tree()
    (corpus / DEDUP).delete_tree()
    del content["stages"]["final"], content["stages"]["dedup"]
    corpus.write_json("corpus.json", content)
    remove(corpus.url, listed("host host-2.example"), LOCAL)
    with session(LOCAL):
        dedup(corpus.url, DedupConfig(perceptual=False), LOCAL)
        totals = repack(corpus.url, RepackConfig(samples_per_shard=SAMPLES_PER_FINAL_SHARD, seed=1), LOCAL)
    assert totals["rows_in"] == Manifest.existing(corpus).totals(RAW)["by_status"]["success"] == 40
    assert totals["samples"] == len(shards.open(corpus.url + "/final")) == 39
    assert "holes" not in totals
    assert verify(corpus / FINAL).ok


def test_without_raw_shards_final_is_enough(corpus: Folder, listed: Listed) -> None:
    for name in (corpus / RAW).names():
        (corpus / RAW).delete(name)
    told, _ = row_of(2, 5)
    assert remove(corpus.url, listed(f"sha256 {hashlib.sha256(body(29)).hexdigest()}"), LOCAL)["samples"] == 1
    assert gone(corpus) == {told["key"]}
    assert verify(corpus / FINAL).ok


def test_another_process_at_work_is_said(corpus: Folder, listed: Listed) -> None:
    with exclusive(corpus), pytest.raises(UserError, match="already working on this folder"):
        remove(corpus.url, listed("key 000020005"), LOCAL)
    with pytest.raises(UserError, match=r"no corpus here"):
        remove(corpus.url + "/nowhere", listed("key 000020005"), LOCAL)


def test_what_goes_is_in_no_pair_to_look_at_and_named_by_no_total(corpus: Folder, listed: Listed) -> None:
    """The stage's own pairs are none here, so some are written; the copy of row 11 goes with it."""
    keys = [row_of(1, row)[0]["key"] for row in range(4)]
    going = row_of(0, 11)[0]["key"]
    pairs = [(keys[0], keys[1]), (going, keys[2]), (keys[3], going)]
    rows = [
        {"key": one, "other_key": other, "method": "perceptual", "side": "within", "distance": 31}
        for one, other in pairs
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=PAIRS_SCHEMA), buffer)
    (corpus / DEDUP).write(THRESHOLDS, buffer.getvalue())
    assert going in Manifest.existing(corpus).totals(DEDUP)["largest_components"][0]["keys"]
    remove(corpus.url, listed(f"key {going}"), LOCAL)
    left = pq.read_table(io.BytesIO((corpus / DEDUP).read(THRESHOLDS)))
    assert left.select(["key", "other_key"]).to_pylist() == [{"key": keys[0], "other_key": keys[1]}]
    assert left.schema == PAIRS_SCHEMA
    assert Manifest.existing(corpus).totals(DEDUP)["largest_components"][0]["keys"] == []
