"""Dedup begun anew with other options: as in a corpus that had them from the start, from the signatures there are."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dedup.config import DedupConfig
from dedup.run import dedup
from infra.cluster import session
from infra.errors import RunError, UserError
from infra.storage import Folder
from pairmill.cli import main
from shards.layout import DEDUP, FINAL, RAW, REMOVED, SIGNATURES, THRESHOLDS
from shards.manifest import Manifest
from shards.repack import RepackConfig, repack
from shards.writer import committed
from tests.dedup.corpora import LOCAL, copies, write_corpus

FIRST, NARROW = DedupConfig(), DedupConfig(distance=0)
CHOSEN = DedupConfig(keep="source", source_column="origin", sources=("web", "curated"))


@pytest.fixture(scope="module", autouse=True)
def one_ray() -> Iterator[None]:
    """One local Ray for all tests here: the stage uses the connection it finds."""
    with session(LOCAL):
        yield


def raw(path: Path) -> str:
    rows = [row | {"origin": "web" if number == 5 else "curated"} for number, row in enumerate(copies())]
    return write_corpus(path, rows, 3)


def outcome(corpus: str) -> dict[str, Any]:
    folder = Folder(corpus) / DEDUP
    tables = {name: pq.read_table(io.BytesIO(folder.read(name))).to_pylist() for name in (REMOVED, THRESHOLDS)}
    return tables | {"stage": Folder(corpus).read_json("corpus.json")["stages"][DEDUP]}


def signature_times(corpus: str) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in (Path(corpus) / DEDUP / SIGNATURES).iterdir()}


def files(corpus: str) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(corpus).rglob("*") if path.is_file() and path.name != ".lock"}


def test_the_outcome_is_that_of_a_new_corpus_and_signatures_stay(tmp_path: Path) -> None:
    corpus, fresh = raw(tmp_path / "corpus"), raw(tmp_path / "fresh")
    first, before = dedup(corpus, FIRST, LOCAL), signature_times(corpus)
    totals = dedup(corpus, NARROW, LOCAL, anew=True)
    assert totals == dedup(fresh, NARROW, LOCAL) != first
    assert outcome(corpus) == outcome(fresh)
    assert signature_times(corpus) == before
    assert dedup(corpus, NARROW, LOCAL) == totals
    with pytest.raises(UserError, match=r"distance: 0 there, 31 now\); use the same.*--anew"):
        dedup(corpus, FIRST, LOCAL)


def test_a_corpus_without_a_dedup_takes_it_as_the_first(tmp_path: Path) -> None:
    corpus, fresh = raw(tmp_path / "corpus"), raw(tmp_path / "fresh")
    assert dedup(corpus, NARROW, LOCAL, anew=True) == dedup(fresh, NARROW, LOCAL)
    assert outcome(corpus) == outcome(fresh)


@pytest.mark.parametrize("config", [NARROW, CHOSEN])
def test_one_that_was_interrupted_goes_on_with_the_new_options(tmp_path: Path, config: DedupConfig) -> None:
    """Killed as soon as it had begun: the list and the signatures are still those of the first."""
    corpus, fresh = raw(tmp_path / "corpus"), raw(tmp_path / "fresh")
    dedup(corpus, FIRST, LOCAL)
    Manifest.existing(Folder(corpus)).begin_anew(DEDUP, config)
    with pytest.raises(UserError, match="'dedup' is not finished yet"):
        repack(corpus, RepackConfig(), LOCAL)
    with pytest.raises(UserError, match="another configuration"):
        dedup(corpus, FIRST, LOCAL)
    dedup(corpus, config, LOCAL)
    dedup(fresh, config, LOCAL)
    assert outcome(corpus) == outcome(fresh)


def test_another_column_of_sources_is_read(tmp_path: Path) -> None:
    corpus, fresh = raw(tmp_path / "corpus"), raw(tmp_path / "fresh")
    dedup(corpus, FIRST, LOCAL)
    before = signature_times(corpus)
    dedup(corpus, CHOSEN, LOCAL, anew=True)
    dedup(fresh, CHOSEN, LOCAL)
    assert outcome(corpus) == outcome(fresh)
    assert {row["kept_key"] for row in outcome(corpus)[REMOVED]} == {"000010002"}
    after = signature_times(corpus)
    assert all(after[name] > time for name, time in before.items())
    dedup(corpus, NARROW, LOCAL, anew=True)
    assert signature_times(corpus) == after


def test_final_shards_are_in_the_way_until_they_are_removed(tmp_path: Path) -> None:
    corpus, fresh = raw(tmp_path / "corpus"), raw(tmp_path / "fresh")
    dedup(corpus, FIRST, LOCAL)
    first = repack(corpus, RepackConfig(), LOCAL)
    before = files(corpus)
    with pytest.raises(UserError, match="`pairmill repack` has begun it from what 'dedup' made; remove final/"):
        dedup(corpus, NARROW, LOCAL, anew=True)
    assert files(corpus) == before
    shutil.rmtree(Path(corpus) / FINAL)
    dedup(corpus, NARROW, LOCAL, anew=True)
    dedup(fresh, NARROW, LOCAL)
    again = repack(corpus, RepackConfig(samples_per_shard=2), LOCAL)
    assert again == repack(fresh, RepackConfig(samples_per_shard=2), LOCAL)
    assert again["samples"] > first["samples"]


def test_without_the_raw_shards_nothing_is_given_up(tmp_path: Path) -> None:
    corpus = raw(tmp_path / "corpus")
    manifest = Manifest.existing(Folder(corpus))
    manifest.finish(RAW, manifest.totals(RAW) | {"shards": len(committed(Folder(corpus) / RAW))})
    dedup(corpus, FIRST, LOCAL)
    shutil.rmtree(Path(corpus) / RAW)
    before = files(corpus)
    with pytest.raises(RunError, match="3 of 3 shards have gone"):
        dedup(corpus, NARROW, LOCAL, anew=True)
    assert files(corpus) == before


def test_the_command_takes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = raw(tmp_path / "corpus")
    for options, code, words in (
        (["--distance", "20"], 0, ""),
        (["--distance", "8"], 2, "or begin it anew with --anew"),
        (["--distance", "8", "--anew"], 0, ""),
        (["--distance", "8", "--anew", "--report-only"], 2, "leave --anew out"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["dedup", corpus, *options])
        assert end.value.code == code
        assert words in capsys.readouterr().err
    assert Manifest.existing(Folder(corpus)).config(DEDUP)["distance"] == 8
