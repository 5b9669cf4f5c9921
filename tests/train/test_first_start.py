"""A run that never took a step binds nobody, and a rank that waits for rank 0 says so."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.errors import RunError, UserError
from infra.storage import Folder
from train import launch
from train.config import RunConfig
from train.launch import prepare, train
from train.tokenizer import TOKENIZER_NAME, CorpusTokenizer

MakeConfig = Callable[..., RunConfig]


def test_a_mended_configuration_takes_the_folder(
    tmp_path: Path, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights that are no weights are found by a rank, once the folder is written."""
    run, weights = tmp_path / "run", tmp_path / "weights.safetensors"
    weights.write_bytes(b"none")
    elsewhere = {"folder": str(tmp_path / "checkpoints")}
    with pytest.raises(UserError, match=r"weights\.safetensors"):
        train(make_config(length="1 steps", model={"weights": str(weights)}), run, 1)
    mended = make_config(length="1 steps", tokenizer={"vocabulary": 310}, checkpoint=elsewhere)
    with caplog.at_level(logging.INFO):
        assert train(mended, run, 1)["steps"] == 1
    assert "its run took no step; it begins with model.weights: " in caplog.text
    assert json.loads((run / "config.json").read_text())["tokenizer"]["vocabulary"] == 310
    assert len(json.loads((run / "tokenizer.json").read_text())["model"]["vocab"]) <= 310


@pytest.mark.parametrize("first", [None, {"name": "RN10-tiny"}])
def test_a_vocabulary_that_is_killed_over_is_not_another_run_s(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, first: dict[str, str] | None
) -> None:
    """Whatever was written before: whoever finds a vocabulary finds the configuration that it was made for."""
    run = tmp_path / "run"
    if first is not None:
        prepare(make_config(model=first), run, 1)
    with monkeypatch.context() as killed:
        killed.setattr(CorpusTokenizer, "save", _save_and_die)
        with pytest.raises(KeyboardInterrupt):
            prepare(make_config(tokenizer={"vocabulary": 300}), run, 1)
    prepare(make_config(model=first or {}), run, 1)
    assert len(json.loads((run / "tokenizer.json").read_text())["model"]["vocab"]) > 300


def _save_and_die(tokenizer: CorpusTokenizer, folder: Folder) -> None:
    folder.write(TOKENIZER_NAME, tokenizer.to_json().encode())
    raise KeyboardInterrupt


def test_a_side_that_the_model_does_not_take_leaves_nothing(tmp_path: Path, make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"data\.image_size: 40 pixels"):
        prepare(make_config(model={"name": "ViT-nano"}, data={"image_size": 40}), tmp_path / "run", 1)
    assert not list((tmp_path / "run").glob("*"))


@pytest.mark.parametrize("kept", ["log.jsonl", "result.json", "checkpoints/step-0000000001/meta.json"])
def test_a_run_that_took_a_step_keeps_its_configuration(tmp_path: Path, make_config: MakeConfig, kept: str) -> None:
    run = tmp_path / "run"
    prepare(make_config(), run, 1)
    (run / kept).parent.mkdir(parents=True, exist_ok=True)
    (run / kept).write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="holds a run of another configuration"):
        prepare(make_config(length="3 steps"), run, 1)


def test_weights_that_are_not_there_are_named_first(tmp_path: Path, make_config: MakeConfig) -> None:
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"model.weights: /none: no such file of weights"):
        prepare(make_config(model={"weights": "/none"}), run, 1)
    assert not (run / "config.json").exists()


@pytest.fixture
def as_rank_1(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("as_rank_1")
def test_a_rank_that_waits_for_rank_0_says_so_and_ends(
    tmp_path: Path, make_config: MakeConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a node of torchrun's does not see the folder."""
    monkeypatch.setattr(launch, "WARN_AFTER_S", 0.1)
    run = tmp_path / "run"
    with pytest.raises(RunError, match=r"config.json: not written by rank 0 in 1 s .* that all nodes share"):
        train(make_config(parallel={"timeout_s": 1}), run)
    assert caplog.text.count(f"waiting for rank 0 to write {run}/config.json; is the folder shared by all nodes?") == 1


@pytest.mark.usefixtures("as_rank_1")
def test_a_rank_waits_for_rank_0_to_refuse_another_configuration(tmp_path: Path, make_config: MakeConfig) -> None:
    with pytest.MonkeyPatch.context() as alone:
        alone.delenv("WORLD_SIZE")
        prepare(make_config(), tmp_path / "run", 2)
    with pytest.raises(UserError, match="holds a run of another configuration"):
        train(make_config(length="3 steps", parallel={"timeout_s": 1}), tmp_path / "run")
