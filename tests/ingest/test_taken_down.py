"""What a take-down names is neither fetched nor kept, in a first ingest, in one after a loss, and in a retry."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow.parquet as pq
import pytest

from dedup.takedown import remove
from infra.cluster import ClusterConfig
from infra.storage import Folder
from ingest.config import IngestConfig, PlanConfig
from ingest.plan import plan
from ingest.run import ingest
from pairmill.sample_web.process import SampleWeb
from pairmill.sample_web.rows import write_rows
from shards import tombstones
from shards.verify import verify

Row = dict[str, Any]


def planned(folder: Path, web: SampleWeb, kinds: list[str] | None = None) -> str:
    web.reset()
    rows = write_rows(folder / "rows", web.base_urls, limit=40, share=0.3, kinds=kinds or ["redirect"])
    plan(str(folder / "corpus"), PlanConfig(urls=str(rows.urls), rows_per_shard=20))
    return str(folder / "corpus")


def sidecars(corpus: str) -> dict[str, Row]:
    paths = sorted((Path(corpus) / "raw").glob("*.parquet"))
    return {row["key"]: row for path in paths for row in pq.read_table(path).to_pylist()}


def written(folder: Path, *lines: str) -> str:
    (folder / "list").write_text("\n".join(lines))
    return str(folder / "list")


def check_gone(rows: dict[str, Row], gone: set[str]) -> None:
    assert {key for key, row in rows.items() if row["reason"] == "taken_down"} == gone
    for key in gone:
        told = {name: value for name, value in rows[key].items() if value not in (None, "")}
        assert told.keys() <= {"key", "status", "reason", "detail", "attempts", "fetched_at", "row", "offset", "size"}
        assert (told["status"], told["detail"]) == ("filtered", "tombstones/00001.jsonl")


@pytest.mark.parametrize("way", ["native", "no hashes", "img2dataset"])
def test_what_is_barred_never_becomes_a_sample(
    tmp_path: Path, web: SampleWeb, config: IngestConfig, local_ray: ClusterConfig, way: str
) -> None:
    (tmp_path / "first").mkdir()
    first = planned(tmp_path / "first", web)
    ingest(first, config, local_ray)
    known = sidecars(first)
    samples = [row for row in known.values() if row["status"] == "success"]
    moved = next(row for row in samples if row["final_url"] != row["url"])
    by_url, by_key, by_body, by_look = [row for row in samples if row is not moved][:4]

    corpus = planned(tmp_path, web)
    look = bytearray.fromhex(by_look["phash"])
    look[5] ^= 0b101
    # The peer's picture is another than ours, though not by much.
    lines = [f"url {by_url['url']}", f"url {moved['final_url']}", f"key {by_key['key']}",
             f"sha256 {by_body['sha256']}", f"pdq {look.hex()} {31 if way == 'img2dataset' else 2}"]  # fmt: skip
    assert remove(corpus, written(tmp_path, *lines), local_ray)["samples"] == 0
    if way == "img2dataset":
        config = config.model_copy(update={"engine": "img2dataset"})
    if way == "no hashes":
        config = config.model_copy(update={"image": config.image.model_copy(update={"phash": False})})
    totals = ingest(corpus, config, local_ray)
    rows = sidecars(corpus)
    gone = {row["key"] for row in (moved, by_url, by_key, by_body, by_look)}
    # Where the sample web has one picture at several addresses, its body goes with it.
    bodies = {by_body["sha256"], by_look["sha256"]}
    gone |= {row["key"] for row in samples if row["sha256"] in bodies or row["final_url"] == by_url["url"]}
    gone |= {row["key"] for row in samples if row["url"] == moved["final_url"]}
    gone |= {row["key"] for row in samples if row["final_url"] == moved["final_url"]}
    check_gone(rows, gone)
    assert {key for key, row in rows.items() if row["status"] == "success"} == {row["key"] for row in samples} - gone
    assert totals["by_reason"]["taken_down"] == len(gone)
    assert totals["rows_in"] == sum(totals["by_status"].values()) == len(known)
    asked = web.log()["paths"]
    assert not {urlsplit(row["url"]).path for row in (by_url, by_key)} & set(asked)
    if way == "no hashes":
        assert {row["phash"] for row in rows.values()} == {None}
    assert verify(f"{corpus}/raw").ok


def test_a_raw_shard_made_again_lacks_what_was_removed(
    tmp_path: Path, web: SampleWeb, config: IngestConfig, local_ray: ClusterConfig
) -> None:
    corpus = planned(tmp_path, web)
    before = ingest(corpus, config, local_ray)
    known = sidecars(corpus)
    row = next(row for row in known.values() if row["status"] == "success" and row["url"] == row["final_url"])
    remove(corpus, written(tmp_path, f"sha256 {row['sha256']}"), local_ray)
    gone = set(tombstones.all_removed(Folder(corpus)))
    assert row["key"] in gone
    check_gone(sidecars(corpus), gone)
    raw = Folder(corpus) / "raw"
    for name in raw.names():
        raw.delete(name)
    web.reset()
    after = ingest(corpus, config, local_ray)
    check_gone(sidecars(corpus), gone)
    assert not any(urlsplit(known[key]["url"]).path in web.log()["paths"] for key in gone)
    assert after["rows_in"] == before["rows_in"]
    assert after["by_status"]["success"] == before["by_status"]["success"] - len(gone)
    assert b"".join((raw.read(name)) for name in raw.names()).find(row["url"].encode()) < 0


def test_a_retry_does_not_bring_it(
    tmp_path: Path, web: SampleWeb, config: IngestConfig, local_ray: ClusterConfig
) -> None:
    corpus = planned(tmp_path, web, ["error_once"])
    impatient = config.model_copy(update={"fetch": config.fetch.model_copy(update={"retries": 0})})
    ingest(corpus, impatient, local_ray)
    failed = [row for row in sidecars(corpus).values() if row["transient"]]
    assert len(failed) > 2
    remove(corpus, written(tmp_path, f"url {failed[0]['url']}"), local_ray)
    web.reset()
    again = {urlsplit(row["url"]).path for row in failed[1:]}
    totals = ingest(corpus, impatient, local_ray, retry_failed=True)
    check_gone(sidecars(corpus), {failed[0]["key"]})
    assert urlsplit(failed[0]["url"]).path not in web.log()["paths"]
    assert again <= set(web.log()["paths"])
    assert totals["rows_in"] == sum(totals["by_status"].values())
    assert totals["by_reason"]["taken_down"] == 1


def test_a_row_that_was_tried_again_goes_from_every_shard_it_is_in(
    tmp_path: Path, web: SampleWeb, config: IngestConfig, local_ray: ClusterConfig
) -> None:
    corpus = planned(tmp_path, web, ["error_once"])
    impatient = config.model_copy(update={"fetch": config.fetch.model_copy(update={"retries": 0})})
    first = ingest(corpus, impatient, local_ray)
    failed = {row["key"]: row for row in sidecars(corpus).values() if row["transient"]}
    totals = ingest(corpus, impatient, local_ray, retry_failed=True)
    key, row = next((key, row) for key, row in sidecars(corpus).items() if key in failed and row["status"] == "success")
    remove(corpus, written(tmp_path, f"key {key}"), local_ray)
    paths = [path for folder in ("plan", "raw", "raw/retry") for path in (Path(corpus) / folder).glob("*.parquet")]
    found = [
        (path.parent.name, one) for path in paths if path.name != "rejected-00000.parquet"
        for one in pq.read_table(path).to_pylist() if one["key"] == key
    ]  # fmt: skip
    assert sorted(place for place, _ in found) == ["plan", "raw", "raw", "retry"]
    assert all((one["url"], one["caption"]) == ("", "") for _, one in found)
    assert all(one["row"] == row["row"] for _, one in found)
    assert verify(f"{corpus}/raw").ok
    after = ingest(corpus, impatient, local_ray)
    assert first["rows_in"] == after["rows_in"] == totals["rows_in"]
    assert after["by_status"]["success"] == totals["by_status"]["success"] - 1
    assert after["by_reason"]["taken_down"] == 1
    assert ingest(corpus, impatient, local_ray, retry_failed=True) == after
