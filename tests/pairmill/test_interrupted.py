"""Ctrl-C: the command ends soon with a line, leaves no process, and goes on to the same outcome."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shards.layout import DEDUP, FINAL, RAW
from train import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("made corpus")]

Run = Callable[..., subprocess.CompletedProcess[str]]


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def assert_interrupted(code: int, said: str) -> None:
    assert code == 1
    assert said.splitlines()[-1] == "pairmill: interrupted; run the same command again to go on from here"
    assert not [line for line in said.splitlines()[:-1] if " INFO " not in line], said


def test_ingest(finished: Path, undo: Callable[..., None], begin: Callable[..., Any], pairmill: Run) -> None:
    expected = tars(finished / RAW)
    undo(finished, RAW, DEDUP, FINAL)
    slow = begin("ingest", finished, "--config", finished.parent / "slow.toml")
    slow.wait_until(lambda: len(tars(finished / RAW)) >= 2)
    said = slow.interrupt()
    slow.leaves_nothing()
    assert_interrupted(slow.process.returncode, said)
    there = tars(finished / RAW)
    assert 0 < len(there) < len(expected)
    done = pairmill("ingest", finished, "--config", finished.parent / "corpus.toml")
    assert done.returncode == 0, done.stderr
    assert tars(finished / RAW) == expected
    assert not [path for path in (finished / RAW).iterdir() if path.name.startswith(".")]


def test_ingest_before_its_workers_are_up(finished: Path, undo: Callable[..., None], begin: Callable[..., Any]) -> None:
    undo(finished, RAW, DEDUP, FINAL)
    early = begin("ingest", finished, "--config", finished.parent / "slow.toml")
    early.wait_until(lambda: len(early.family()) > 1)
    said = early.interrupt()
    early.leaves_nothing()
    assert_interrupted(early.process.returncode, said)


def test_training(tmp_path: Path, recipe: Callable[..., Path], begin: Callable[..., Any], pairmill: Run) -> None:
    toml, run, whole = recipe(length="100 steps"), tmp_path / "run", tmp_path / "whole"
    training = begin("train", toml, "--nproc", "2")
    training.wait_until(lambda: (run / "log.jsonl").exists() and (run / "log.jsonl").read_text())
    said = training.interrupt()
    training.leaves_nothing()
    assert_interrupted(training.process.returncode, said)
    assert not (run / "result.json").exists()
    assert len(checkpoint.saved(run / "checkpoints")) >= 1
    for folder in (run, whole):
        done = pairmill("train", toml, "--run", folder, "--nproc", "2")
        assert done.returncode == 0, done.stderr
    one, other = (checkpoint.load_newest(folder / "checkpoints") for folder in (run, whole))
    assert one is not None
    assert other is not None
    assert one["samples"] == other["samples"]
    for name, value in one["model"].items():
        assert torch.equal(value, other["model"][name]), name


def test_training_before_its_ranks_are_up(
    tmp_path: Path, recipe: Callable[..., Path], begin: Callable[..., Any]
) -> None:
    early = begin("train", recipe(), "--nproc", "2")
    early.wait_until(lambda: len(early.family()) > 1)
    said = early.interrupt()
    early.leaves_nothing()
    assert_interrupted(early.process.returncode, said)
