"""What status and the table of rows say of a plan, and of an ingest that was interrupted."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.config import Config
from infra.storage import Folder
from ingest.config import PlanConfig
from ingest.plan import plan
from pairmill import show
from pairmill.status import Watched, status
from shards.layout import RAW, SIDECAR, Reason, Status, sample_key, shard_name, sidecar_schema
from shards.manifest import Manifest
from shards.writer import writing

DAY_S = 86_400.0


@pytest.fixture
def corpus(tmp_path: Path) -> Folder:
    rows = [{"url": f"http://h.example/{number}.jpg", "caption": f"a picture of {number}"} for number in range(30)]
    pq.write_table(pa.Table.from_pylist([*rows, rows[0], {**rows[1], "caption": ""}]), tmp_path / "rows.parquet")
    folder = Folder(tmp_path / "corpus")
    plan(folder.url, PlanConfig(urls=str(tmp_path / "rows.parquet"), rows_per_shard=10))
    Manifest.existing(folder).begin(RAW, Config())
    return folder


def commit(corpus: Folder, number: int, start: float, end: float) -> None:
    """Commit a raw shard of ten samples that was in hand from `start` to `end`."""
    more = {"start_time": start, "end_time": end, "bytes": 100, "by_host": {}}
    with writing(corpus / RAW, shard_name(number), sidecar_schema(), more) as writer:
        for row in range(10):
            fields = dict.fromkeys(SIDECAR.names)
            fields |= {"key": sample_key(number, row), "url": "", "caption": ""}
            writer.add(fields | {"status": Status.SUCCESS, "reason": Reason.NONE}, b"a picture")


def test_pauses_between_runs_do_not_slow_the_rate(corpus: Folder) -> None:
    commit(corpus, 0, 1000.0, 1004.0)
    commit(corpus, 1, 1000.0 + DAY_S, 1001.0 + DAY_S)
    found = status(corpus.url)
    assert found["images_per_s"] == pytest.approx(20 / 5)
    assert found["eta_s"] == pytest.approx(10 / 4)
    assert (found["shards_done"], found["shards_total"]) == (2, 3)


def test_a_watched_corpus_is_read_on_from_where_it_was(corpus: Folder) -> None:
    """What has been counted is not read again, until shards have gone: then all is."""
    commit(corpus, 0, 1000.0, 1004.0)
    watched = Watched(corpus.url)
    assert watched.state() == status(corpus.url)
    first = Path(corpus.path("raw/00000_stats.json"))
    content = first.read_bytes()
    first.write_bytes(b"not JSON, as whoever reads it would say")
    commit(corpus, 1, 1004.0, 1005.0)
    state = watched.state()
    assert (state["rows"], state["shards_done"], state["shards_total"], state["images_per_s"]) == (20, 2, 3, 4.0)
    assert watched.state() == state
    first.write_bytes(content)
    assert watched.state() == status(corpus.url)
    (corpus / RAW).delete("00001_stats.json")
    assert watched.state() == status(corpus.url)
    assert watched.state()["rows"] == 10


def test_kept_rows_of_the_plan_are_called_planned(corpus: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    totals = Manifest.existing(corpus).totals("plan")
    rows = show.accounting(totals)
    assert rows == [("planned", "", 30), ("", "caption_empty", 1), ("", "duplicate_url", 1)]
    assert sum(count for _, _, count in rows) == totals["rows_in"] == 32
    show.stage({"stage": "plan", **totals})
    shown = capsys.readouterr().out
    assert "planned" in shown
    assert "other" not in shown
