"""What failed and may do better is tried again: those rows alone, under their keys, each counted once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import shards
from dedup.config import DedupConfig
from dedup.run import dedup
from infra.cluster import ClusterConfig
from infra.storage import Folder
from ingest import part as parts
from ingest.config import IngestConfig, PlanConfig
from ingest.plan import plan
from ingest.retry import passes
from ingest.run import ingest
from ingest.worker import ShardWorker
from pairmill.sample_web.process import SampleWeb
from pairmill.sample_web.rows import write_rows
from pairmill.status import status
from shards.repack import RepackConfig, repack
from shards.verify import verify

KINDS = ["error_once", "not_found", "noai", "truncated_image", "redirect"]


@pytest.fixture
def planned(tmp_path: Path, web: SampleWeb) -> Path:
    web.reset()
    rows = write_rows(tmp_path / "rows", web.base_urls, limit=60, share=0.5, kinds=KINDS)
    plan(str(tmp_path / "corpus"), PlanConfig(urls=str(rows.urls), rows_per_shard=20))
    return tmp_path / "corpus"


@pytest.fixture
def impatient(config: IngestConfig) -> IngestConfig:
    """No second try within a run: what errs once is left for the next pass."""
    return config.model_copy(update={"fetch": config.fetch.model_copy(update={"retries": 0})})


def sidecars(corpus: Path) -> list[dict[str, Any]]:
    paths = sorted((corpus / "raw").glob("*.parquet"))
    return [row | {"shard": path.stem} for path in paths for row in pq.read_table(path).to_pylist()]


def test_only_transient_failures_are_tried_again(
    planned: Path, impatient: IngestConfig, web: SampleWeb, local_ray: ClusterConfig
) -> None:
    first = ingest(str(planned), impatient, local_ray)
    before = sidecars(planned)
    transient = {row["key"]: row for row in before if row["transient"]}
    assert transient
    assert {row["reason"] for row in transient.values()} == {"http_status"}
    assert {row["http_status"] for row in transient.values()} <= {429, 500, 502, 503}
    asked = web.log()["paths"]

    second = ingest(str(planned), impatient, local_ray, retry_failed=True)
    rows = sidecars(planned)
    again = [row for row in rows if int(row["shard"]) >= first["shards"]]
    assert {row["key"] for row in again} == set(transient)
    for row in again:
        same = transient[row["key"]]
        assert [row[name] for name in ("url", "caption", "row")] == [same[name] for name in ("url", "caption", "row")]
        assert row["status"] == "success"
    newly = {path for path, count in web.log()["paths"].items() if count > asked.get(path, 0)}
    assert newly - {"/robots.txt"} == {urlsplit(row["url"]).path for row in again}
    assert second["rows_in"] == first["rows_in"] == sum(second["by_status"].values())
    assert second["by_status"]["success"] == first["by_status"]["success"] + len(transient)
    assert second["by_reason"].get("http_status", 0) == first["by_reason"]["http_status"] - len(transient)
    assert verify(str(planned / "raw")).faults == []
    state = status(str(planned))
    assert (state["rows"], state["by_status"]) == (second["rows_in"], second["by_status"])
    assert state["shards_done"] == state["shards_total"] == second["shards"] > first["shards"]

    assert ingest(str(planned), impatient, local_ray, retry_failed=True) == second
    assert len(passes(Folder(str(planned)))) == 1


def test_the_later_stages_take_them_in(
    planned: Path, impatient: IngestConfig, web: SampleWeb, local_ray: ClusterConfig
) -> None:
    def built() -> set[str]:
        dedup(str(planned), DedupConfig(perceptual=False), local_ray)
        repack(str(planned), RepackConfig(), local_ray)
        files = (planned / "final").glob("*.parquet")
        tables = [pq.read_table(path) for path in files if path.name != "index.parquet"]
        return {row["source_key"] for table in tables for row in table.to_pylist()}

    ingest(str(planned), impatient, local_ray)
    before = built()
    ingest(str(planned), impatient, local_ray, retry_failed=True)
    after = built()
    (made,) = passes(Folder(str(planned)))
    again = {row["key"] for row in sidecars(planned) if int(row["shard"]) >= made.first}
    assert before < after == before | again
    assert verify(str(planned / "final")).faults == []
    raw = shards.open(str(planned / "raw"))
    for key in again:
        assert raw[key]["__key__"] == key


def test_a_pass_that_was_interrupted_is_ended_and_no_other_begun(
    planned: Path, impatient: IngestConfig, web: SampleWeb, local_ray: ClusterConfig
) -> None:
    ingest(str(planned), impatient, local_ray)
    totals = ingest(str(planned), impatient, local_ray, retry_failed=True)
    (only,) = passes(Folder(str(planned)))
    for path in (planned / "raw").glob(f"{only.first:05d}*"):
        path.unlink()
    web.reset()  # the same rows err once more
    again = ingest(str(planned), impatient, local_ray, retry_failed=True)
    assert len(passes(Folder(str(planned)))) == 1
    assert again["rows_in"] == totals["rows_in"]
    last = ingest(str(planned), impatient, local_ray, retry_failed=True)
    assert last["by_status"] == totals["by_status"]
    assert [one.since for one in passes(Folder(str(planned)))] == [0, only.first]


def test_a_lost_shard_leaves_to_the_pass_what_it_took_up(
    planned: Path, impatient: IngestConfig, web: SampleWeb, local_ray: ClusterConfig
) -> None:
    ingest(str(planned), impatient, local_ray)
    totals = ingest(str(planned), impatient, local_ray, retry_failed=True)
    copy = planned.with_name("copy")
    shutil.copytree(planned, copy)
    for path in (planned / "raw").glob("00000*"):
        path.unlink()
    again = ingest(str(planned), impatient, local_ray)
    assert (again["by_status"], again["by_reason"]) == (totals["by_status"], totals["by_reason"])
    assert (planned / "raw" / "00000.tar").read_bytes() == (copy / "raw" / "00000.tar").read_bytes()


def test_a_part_of_the_plan_is_one_whatever_its_columns_are_called(tmp_path: Path) -> None:
    """Of a corpus that was planned before the name was kept for the passes."""
    (tmp_path / "plan").mkdir()
    row = {"key": "000000000", "url": "http://a.example/1", "caption": "a good one", "row": 0, "earlier_status": "mine"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "plan" / "part-00000.parquet")
    part = parts.read(Folder(tmp_path), 0)
    assert (part.rows, part.supersedes) == ([row], {})
    assert "earlier_status" in part.schema.names


def test_nothing_to_try_again(tmp_path: Path, config: IngestConfig, web: SampleWeb, local_ray: ClusterConfig) -> None:
    web.reset()
    rows = write_rows(tmp_path / "rows", web.base_urls, limit=20, share=0.3, kinds=["not_found"])
    corpus = tmp_path / "corpus"
    plan(str(corpus), PlanConfig(urls=str(rows.urls)))
    totals = ingest(str(corpus), config, local_ray)
    assert ingest(str(corpus), config, local_ray, retry_failed=True) == totals
    assert passes(Folder(str(corpus))) == []


def test_a_shard_is_cut_at_its_deadline(
    tmp_path: Path, config: IngestConfig, web: SampleWeb, local_ray: ClusterConfig
) -> None:
    """Hosts that never answer would hold the shard; what they hold is marked, and tried again by the pass."""
    web.reset()
    rows = write_rows(tmp_path / "rows", web.base_urls, limit=30, share=0)
    corpus = tmp_path / "corpus"
    plan(str(corpus), PlanConfig(urls=str(rows.urls)))
    slow = config.fetch.model_copy(update={"per_host_in_flight": 1, "per_host_per_s": 2.0})
    worker = ShardWorker(str(corpus), config.model_copy(update={"fetch": slow, "shard_deadline_s": 2.0}))
    try:
        stats = worker.run(0)
    finally:
        worker.close()
    left = stats["by_reason"]["not_attempted"]
    assert stats["by_status"] == {"failed_to_download": left, "success": 30 - left}
    assert 0 < left < 30
    cut = [row for row in sidecars(corpus) if row["reason"] == "not_attempted"]
    assert all(row["transient"] and "deadline of 2 s" in row["detail"] for row in cut)
    totals = ingest(str(corpus), config, local_ray, retry_failed=True)
    assert totals["by_status"] == {"success": 30}
    commits = [json.loads(path.read_text()) for path in sorted((corpus / "raw").glob("*_stats.json"))]
    assert [commit["count"] for commit in commits] == [30, left]
