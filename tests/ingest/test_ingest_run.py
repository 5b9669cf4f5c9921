"""The whole stage on a local Ray: a small web with every misbehaviour, from rows to shards."""

from __future__ import annotations

import io
import json
import resource
import tarfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from PIL import Image

from infra.cluster import ClusterConfig
from infra.errors import NoSpaceError, RunError, UserError
from infra.lock import exclusive
from infra.storage import Folder
from ingest.config import ImageConfig, IngestConfig, PlanConfig
from ingest.plan import plan
from ingest.run import ingest
from ingest.totals import busy_seconds
from ingest.worker import ShardWorker
from pairmill.sample_web import archive
from pairmill.sample_web.process import SampleWeb
from pairmill.sample_web.rows import write_rows
from shards.layout import Reason, Status
from shards.manifest import Manifest

READER = Any


@pytest.fixture
def planned(tmp_path: Path, web: SampleWeb) -> Path:
    """A corpus of four parts of good rows, planned."""
    rows = write_rows(tmp_path / "rows", web.base_urls, limit=40, share=0)
    plan(str(tmp_path / "corpus"), PlanConfig(urls=str(rows.urls), rows_per_shard=10))
    return tmp_path / "corpus"


def tars(corpus: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((corpus / "raw").glob("*.tar"))}


def test_every_misbehaviour_ends_as_it_should(
    tmp_path: Path, web: SampleWeb, config: IngestConfig, local_ray: ClusterConfig, read_corpus: READER
) -> None:
    web.reset()
    written = write_rows(tmp_path / "rows", web.base_urls, limit=90, share=0.1)
    corpus = tmp_path / "corpus"
    plan_totals = plan(str(corpus), PlanConfig(urls=str(written.urls), rows_per_shard=60))
    totals = ingest(str(corpus), config, local_ray)

    assert plan_totals["rows_in"] == written.rows
    assert totals["rows_in"] == plan_totals["rows_out"] == sum(totals["by_status"].values())
    assert totals["shards"] == plan_totals["parts"] > 1
    rows = read_corpus(corpus)
    assert sorted(rows) == list(range(written.rows))
    assert_as_expected(tmp_path / "rows", rows)
    assert Counter(row["status"] for row in rows.values())["filtered"] == (
        totals["by_status"]["filtered"] + plan_totals["by_status"]["filtered"]
    )
    assert web.log()["too_soon"] == 0
    assert_stats(corpus, totals)
    assert_plain_webdataset(corpus, rows)
    assert ingest(str(corpus), config, local_ray) == totals


def assert_as_expected(folder: Path, rows: dict[int, dict[str, Any]]) -> None:
    by_url: defaultdict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = defaultdict(list)
    for number, expected in enumerate(pq.read_table(folder / "expected.parquet").to_pylist()):
        by_url[expected["url"]].append((expected, rows[number]))
    for same in by_url.values():
        wanted = Counter((one["expected_status"], one["expected_reason"]) for one, _ in same)
        found = Counter((row["status"], row["reason"]) for _, row in same)
        if None in {part for pair in wanted for part in pair}:
            for expected, row in same:
                assert expected["expected_status"] in (None, row["status"])
                assert expected["expected_reason"] in (None, row["reason"])
                assert row["status"] != Status.SUCCESS
        else:  # which one of the rows with the same URL is kept, the order of the list decides
            assert found == wanted, same


def assert_stats(corpus: Path, totals: dict[str, Any]) -> None:
    stats = [json.loads(path.read_text()) for path in sorted((corpus / "raw").glob("*_stats.json"))]
    assert sum(one["count"] for one in stats) == totals["rows_in"]
    assert sum(one["bytes"] for one in stats) == totals["bytes"] > 0
    hosts = sum(count for one in stats for reasons in one["by_host"].values() for count in reasons.values())
    assert hosts == totals["rows_in"] - totals["by_status"]["success"]
    assert all(one["requests"] and one["end_time"] >= one["start_time"] for one in stats)
    assert totals["images_per_s"] > 0


def assert_plain_webdataset(corpus: Path, rows: dict[int, dict[str, Any]]) -> None:
    kept = {row["key"]: row for row in rows.values() if row["status"] == Status.SUCCESS}
    urls = [str(path) for path in sorted((corpus / "raw").glob("*.tar"))]
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode("pilrgb"))
    assert [sample["__key__"] for sample in samples] == sorted(kept)
    for sample in samples:
        row = kept[sample["__key__"]]
        assert sample["txt"] == row["caption"]
        assert sample["jpg"].size == (row["width"], row["height"])
        assert min(sample["jpg"].size) == 64
        assert sample["json"]["sha256"] == row["sha256"]
        assert len(row["phash"]) == 64


def test_the_pictures_are_the_right_ones(
    planned: Path, config: IngestConfig, local_ray: ClusterConfig, read_corpus: READER
) -> None:
    ingest(str(planned), config, local_ray)
    for row in list(read_corpus(planned).values())[:12]:
        number = int(row["key"][:-4])
        with (planned / "raw" / f"{number:05d}.tar").open("rb") as tar:
            tar.seek(row["image_offset"])
            data = tar.read(row["image_bytes"])
        found = np.asarray(Image.open(io.BytesIO(data)), float)
        picture = archive.by_key()[row["url"].rpartition("/")[2].rpartition(".")[0]]
        wanted = np.asarray(picture.image(64), float)
        assert np.abs(found - wanted).mean() < 12


def test_two_runs_give_the_same_bytes(planned: Path, config: IngestConfig, web: SampleWeb) -> None:
    first, second = {}, {}
    for into in (first, second):
        web.reset()
        worker = ShardWorker(str(planned), config)
        try:
            for part in (0, 3):
                worker.run(part)
        finally:
            worker.close()
        into.update(tars(planned))
        into["stats"] = {
            path.name: json.loads(path.read_text())["tar_sha256"].encode()
            for path in (planned / "raw").glob("*_stats.json")
        }
    assert first == second
    with tarfile.open(planned / "raw" / "00000.tar") as tar:
        assert {(member.uid, member.gid, member.mtime) for member in tar} == {(0, 0, 0)}


def test_what_is_committed_is_not_fetched_again(
    planned: Path, config: IngestConfig, local_ray: ClusterConfig, web: SampleWeb
) -> None:
    web.reset()
    worker = ShardWorker(str(planned), config)
    try:
        worker.run(1)
    finally:
        worker.close()
    before = web.log()["kinds"]["images"]
    raw = planned / "raw"
    (raw / ".tmp-00002.tar-0a0b0c0d").write_bytes(b"torn")
    (raw / "00003.tar").write_bytes(b"whole, but without its commit")
    Manifest.existing(Folder(planned)).begin("raw", config)
    totals = ingest(str(planned), config, local_ray)
    assert before == 10
    assert web.log()["kinds"]["images"] == 40
    assert totals["rows_in"] == 40 == totals["by_status"]["success"]
    assert not [path.name for path in raw.iterdir() if path.name.startswith(".")]


def test_a_corrupt_part_fails_alone_and_by_name(planned: Path, config: IngestConfig, local_ray: ClusterConfig) -> None:
    part = planned / "plan" / "part-00002.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[:200])
    with pytest.raises(RunError, match=r"1 of 4 parts failed \(part-00002\.parquet\).*damaged") as caught:
        ingest(str(planned), config, local_ray)
    assert "\n" not in str(caught.value)
    assert sorted(tars(planned)) == ["00000.tar", "00001.tar", "00003.tar"]
    assert not Manifest.existing(Folder(planned)).is_done("raw")
    part.write_bytes(whole)
    assert ingest(str(planned), config, local_ray)["shards"] == 4


def test_other_settings_are_not_mixed_in_but_knobs_may_change(
    planned: Path, config: IngestConfig, local_ray: ClusterConfig
) -> None:
    ingest(str(planned), config, local_ray)
    faster = config.model_copy(update={"workers": 1, "fetch": config.fetch.model_copy(update={"concurrency": 9})})
    assert ingest(str(planned), faster, local_ray)["shards"] == 4
    with pytest.raises(UserError, match=r"image\.size: 64 there, 32 now"):
        ingest(str(planned), config.model_copy(update={"image": ImageConfig(size=32)}), local_ray)


def test_a_second_process_says_so_and_leaves(planned: Path, config: IngestConfig) -> None:
    with exclusive(Folder(planned)), pytest.raises(UserError, match="already working on this folder"):
        ingest(str(planned), config, ClusterConfig())
    assert not (planned / "raw").exists()


def test_without_a_plan_there_is_nothing_to_do(tmp_path: Path, config: IngestConfig) -> None:
    with pytest.raises(UserError, match="pairmill plan"):
        ingest(str(tmp_path / "nowhere"), config, ClusterConfig())
    assert not (tmp_path / "nowhere").exists()


def test_a_large_run_needs_an_address_to_write_to(planned: Path, config: IngestConfig) -> None:
    manifest = json.loads((planned / "corpus.json").read_text())
    manifest["stages"]["plan"]["totals"]["rows_out"] = 100_001
    (planned / "corpus.json").write_text(json.dumps(manifest))
    public = config.model_copy(update={"fetch": config.fetch.model_copy(update={"allow_private": False})})
    with pytest.raises(UserError, match=r"fetch\.contact"):
        ingest(str(planned), public, ClusterConfig())


def test_memory_waits_for_the_decoder(planned: Path, config: IngestConfig) -> None:
    tight = config.model_copy(update={"buffer_bytes": 1})
    worker = ShardWorker(str(planned), tight)
    try:
        assert worker.run(0)["successes"] == 10
        assert worker._buffered == 0
    finally:
        worker.close()


def test_a_shard_that_fails_half_way_leaves_its_worker_room(planned: Path, config: IngestConfig) -> None:
    """What of it waited for the writer must not count for ever, or no request would be sent again."""
    worker = ShardWorker(str(planned), config.model_copy(update={"buffer_bytes": 1}))
    bound = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, bound[1]))
        try:
            with pytest.raises(NoSpaceError):
                worker.run(0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, bound)
        assert worker.run(1)["count"] == 10
        assert worker._buffered == 0
    finally:
        worker.close()


def test_time_between_runs_does_not_count() -> None:
    assert busy_seconds([]) == 0.0
    assert busy_seconds([(5.0, 7.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.0)]) == 5.0


def test_rows_that_name_no_picture_are_counted_by_reason(
    tmp_path: Path, config: IngestConfig, read_corpus: READER
) -> None:
    (tmp_path / "rows.txt").write_text("http://127.0.0.1:9/1.jpg\nhttp://127.0.0.1:9/2.jpg\n")
    corpus = tmp_path / "corpus"
    assert plan(str(corpus), PlanConfig(urls=str(tmp_path / "rows.txt")))["rows_out"] == 2
    worker = ShardWorker(str(corpus), config)
    try:
        stats = worker.run(0)
    finally:
        worker.close()
    assert stats["by_reason"] == {"connect": 2}
    assert {row["reason"] for row in read_corpus(corpus).values()} == {Reason.CONNECT}
