"""The command line as a user meets it: real processes, their exit codes, one line for each mistake."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROWS = [{"url": f"http://127.0.0.1:9/{number}.jpg", "caption": f"a picture of thing {number}"} for number in range(20)]


Run = Callable[..., subprocess.CompletedProcess[str]]
Mistake = Callable[..., str]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    return path


def test_every_command_explains_itself(pairmill: Run) -> None:
    done = pairmill("--help")
    assert done.returncode == 0
    for command in (
        "quickstart",
        "plan",
        "ingest",
        "dedup",
        "repack",
        "verify",
        "status",
        "report",
        "run",
        "train",
        "eval",
        "export",
    ):
        assert command in done.stdout
    options = pairmill("ingest", "--help").stdout
    assert "--image.size" in options
    assert "--fetch.allow-private" in options


def test_plan_prints_its_accounting_as_json(tmp_path: Path, rows: Path, pairmill: Run) -> None:
    done = pairmill("plan", tmp_path / "corpus", "--urls", rows, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["rows_in"] == len(ROWS)
    assert sum(result["by_status"].values()) == len(ROWS)


def test_an_unknown_option_suggests_the_nearest(tmp_path: Path, rows: Path, mistake: Mistake) -> None:
    assert "--urls" in mistake("plan", tmp_path / "corpus", "--url", rows)
    assert "--image.size" in mistake("ingest", tmp_path / "corpus", "--image.sise", "3")


def test_an_unknown_command_suggests_the_nearest(mistake: Mistake) -> None:
    assert "ingest" in mistake("ingst", "corpus")


def test_a_value_out_of_range_names_its_option(tmp_path: Path, rows: Path, mistake: Mistake) -> None:
    assert "--rows-per-shard" in mistake("plan", tmp_path / "c", "--urls", rows, "--rows-per-shard", "0")


def test_options_that_do_not_go_together(tmp_path: Path, mistake: Mistake) -> None:
    line = mistake("dedup", tmp_path, "--keep", "source")
    assert "pairmill: options: keep 'source' needs source_column and sources" in line


def test_an_unknown_toml_key_suggests_the_nearest(tmp_path: Path, rows: Path, mistake: Mistake) -> None:
    toml = tmp_path / "corpus.toml"
    toml.write_text(f'corpus = "{tmp_path / "corpus"}"\n[plan]\nurls = "{rows}"\nurl_coll = "url"\n')
    line = mistake("run", toml)
    assert "plan.url_coll" in line
    assert "did you mean 'url_col'" in line
    assert str(toml) in line


def test_a_toml_file_that_is_none(tmp_path: Path, mistake: Mistake) -> None:
    assert "no such configuration file" in mistake("run", tmp_path / "nowhere.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("corpus = ")
    assert "not valid TOML" in mistake("run", broken)


def test_a_url_file_that_is_missing(tmp_path: Path, mistake: Mistake) -> None:
    assert "nowhere.parquet" in mistake("plan", tmp_path / "corpus", "--urls", tmp_path / "nowhere.parquet")


def test_a_url_file_that_is_empty(tmp_path: Path, mistake: Mistake) -> None:
    empty = tmp_path / "empty.csv"
    empty.write_bytes(b"")
    assert "empty" in mistake("plan", tmp_path / "corpus", "--urls", empty)


def test_a_url_file_without_the_column_lists_those_it_has(tmp_path: Path, rows: Path, mistake: Mistake) -> None:
    line = mistake("plan", tmp_path / "corpus", "--urls", rows, "--caption-col", "text")
    assert "text" in line
    assert "caption" in line
    assert "url" in line


def test_a_corpus_that_is_not_there(tmp_path: Path, mistake: Mistake) -> None:
    for command in ("ingest", "dedup", "repack", "status"):
        assert "corpus" in mistake(command, tmp_path / "nowhere")


def test_a_stage_before_its_time(tmp_path: Path, rows: Path, pairmill: Run, mistake: Mistake) -> None:
    corpus = tmp_path / "corpus"
    assert pairmill("plan", corpus, "--urls", rows).returncode == 0
    assert "not finished" in mistake("dedup", corpus)


def test_a_checkpoint_or_suite_that_is_not_there(tmp_path: Path, mistake: Mistake) -> None:
    line = mistake("eval", tmp_path / "nowhere", "--suite", tmp_path / "no-suite")
    assert f"{tmp_path / 'nowhere'}: no such folder" in line
    line = mistake("export", tmp_path / "nowhere", "--format", "huggingface", "--out", tmp_path / "out")
    assert f"{tmp_path / 'nowhere'}: no such folder" in line
