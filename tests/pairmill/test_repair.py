"""Shards that are damaged or gone, on a finished corpus: the command line finds, drops and makes them again."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SAME = ("raw/*.tar", "dedup/**/*.parquet", "final/*.tar")
"""What a raw shard fetched again does not change: sidecars alone hold the time at which it was."""
Pairmill = Callable[..., subprocess.CompletedProcess[str]]


def stages_done(corpus: Path) -> dict[str, bool]:
    stages: dict[str, dict[str, Any]] = json.loads((corpus / "corpus.json").read_text())["stages"]
    return {name: record["done"] for name, record in stages.items()}


def files(corpus: Path, *patterns: str) -> dict[str, bytes]:
    return {str(path.relative_to(corpus)): path.read_bytes() for one in patterns for path in corpus.glob(one)}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3000])


@pytest.mark.slow
def test_a_damaged_shard_is_repaired_by_option_and_made_again(finished: Path, pairmill: Pairmill) -> None:
    raw, final = finished / "raw", finished / "final"
    before = files(finished, *SAME)
    cut(final / "00001.tar")
    cut(raw / "00002.tar")
    for folder in (final, raw):
        assert pairmill("verify", folder).returncode == 1
        done = pairmill("verify", folder, "--repair", "--json")
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert result["faults"] == []
        assert any("dropped the torn shard" in line for line in result["repaired"])
    assert stages_done(finished) == {"plan": True, "raw": False, "dedup": False, "final": False}
    assert not (finished / "dedup" / "signatures" / "00002.parquet").exists()
    early = pairmill("repack", finished, "--config", finished.parent / "corpus.toml")
    assert early.returncode == 2
    assert "'dedup' is not finished yet" in early.stderr
    again = pairmill("run", finished.parent / "corpus.toml")
    assert again.returncode == 0, again.stderr
    assert files(finished, *SAME) == before


def test_a_shard_removed_by_hand_is_noticed_by_its_stage(finished: Path, pairmill: Pairmill) -> None:
    before = files(finished, *SAME)
    for path in [*(finished / "raw").glob("00001*"), *(finished / "final").glob("00000*")]:
        path.unlink()
    (finished / "dedup" / "removed.parquet").unlink()
    again = pairmill("run", finished.parent / "corpus.toml")
    assert again.returncode == 0, again.stderr
    assert files(finished, *SAME) == before


@pytest.mark.parametrize("name", ["00000_stats.json", "00000.tar"])
def test_the_only_shard_of_a_folder_may_be_the_torn_one(finished: Path, pairmill: Pairmill, name: str) -> None:
    final = finished / "final"
    for path in final.glob("*"):
        if not path.name.startswith("00000"):
            path.unlink()
    (final / name).write_bytes(b"")
    done = pairmill("verify", final, "--repair")
    assert done.returncode == 0, done.stderr
    assert "0 shards, 0 samples" in done.stdout
    again = pairmill("repack", finished, "--config", finished.parent / "corpus.toml")
    assert again.returncode == 0, again.stderr
    assert pairmill("verify", final).returncode == 0


def test_what_was_removed_whole_after_the_final_shards_is_not_crawled_again(finished: Path, pairmill: Pairmill) -> None:
    for path in (finished / "raw").glob("*"):
        path.unlink()
    again = pairmill("run", finished.parent / "corpus.toml")
    assert again.returncode == 0, again.stderr
    assert list((finished / "raw").glob("*")) == []


def test_repair_needs_a_whole_look(finished: Path, mistake: Callable[..., str]) -> None:
    assert "leave --quick out" in mistake("verify", finished / "final", "--repair", "--quick")


def test_nothing_to_mend_is_said_so(finished: Path, pairmill: Pairmill) -> None:
    done = pairmill("verify", finished / "final", "--repair", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["repaired"] == []
