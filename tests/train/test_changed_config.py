"""A run that goes on under another learning rate: only when asked for, and on record."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.config import assigned
from infra.errors import UserError
from infra.storage import Folder
from pairmill.cli import app
from train.config import RunConfig
from train.launch import prepare
from train.loop import fit, resumed
from train.state import build

MakeConfig = Callable[..., RunConfig]


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("folder", ["", "memory://checkpoints-of-a-changed-run"])
def test_it_goes_on_when_asked_for(tmp_path: Path, make_config: MakeConfig, folder: str) -> None:
    """From the checkpoint at step 2, with a note; then as the run that it has become."""
    old = {"optim": {"learning_rate": 1e-3, "schedule": "constant"}, "checkpoint": {"folder": folder}}
    new = {**old, "optim": {**old["optim"], "learning_rate": 1e-4}}
    config, changed = (make_config(length="4 steps", **tables) for tables in (old, new))
    prepare(config, tmp_path, 1)
    state = resumed(build(config, tmp_path), tmp_path)
    fit(state, tmp_path, lambda: state.step == 2)
    with pytest.raises(UserError, match=r"learning_rate: 0\.001 there, 0\.0001 now.* or go on .* --changed-config"):
        prepare(changed, tmp_path, 1)
    assert prepare(changed, tmp_path, 1, may_change=True) is None
    fit(resumed(build(changed, tmp_path), tmp_path), tmp_path, lambda: False)
    rates = {line["step"]: line["learning_rate"] for line in lines(tmp_path) if "loss" in line}
    assert rates == {1: 1e-3, 2: 1e-3, 3: 1e-4, 4: 1e-4}
    (note,) = [line for line in lines(tmp_path) if "note" in line]
    assert (note["step"], note["samples"]) == (2, 32)
    assert "optim.learning_rate: 0.001 there, 0.0001 now" in note["note"]
    assert prepare(changed, tmp_path, 1) is None
    assert resumed(build(changed, tmp_path), tmp_path).changed == []
    with pytest.raises(UserError, match=r"0\.0001 there, 0\.001 now"):
        prepare(config, tmp_path, 1)
    if folder:
        Folder(folder).delete_tree()


@pytest.mark.parametrize("tables", [{"length": "5 steps"}, {"optim": {"warmup": "1 steps"}}, {"data": {"seed": 1}}])
def test_what_makes_another_run_stays(tmp_path: Path, make_config: MakeConfig, tables: dict[str, Any]) -> None:
    """Beside a change that may be; only the other is named."""
    prepare(make_config(), tmp_path, 1)
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n')
    before = (tmp_path / "config.json").read_bytes()
    both = {**tables, "optim": {**tables.get("optim", {}), "weight_decay": 0.3}}
    with pytest.raises(UserError, match=r"take a new folder$") as caught:
        prepare(make_config(**both), tmp_path, 1, may_change=True)
    assert "weight_decay" not in str(caught.value)
    assert (tmp_path / "config.json").read_bytes() == before


def test_settings_are_laid_over_the_file(make_config: MakeConfig) -> None:
    base = make_config()
    settings = ["optim.learning_rate=1e-4", "length=7 steps", "log.to=['prometheus']", "model.name = ViT-nano"]
    found = assigned(base, settings, source="--set")
    assert (found.optim.learning_rate, found.length, found.log.to) == (1e-4, "7 steps", ("prometheus",))
    assert (found.model.name, found.model.embed_dim, found.optim.ema) == ("ViT-nano", 16, 0.9)
    assert assigned(base, [], source="--set") == base


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optim.learning_rate", r"--set optim.learning_rate: gives no value; write KEY=VALUE"),
        ("optim.learning_rat=1", r"--set: unknown key 'optim.learning_rat' \(did you mean 'learning_rate'\?\)"),
        ("optim.learning_rate=fast", r"--set: 'optim.learning_rate': .* \(got 'fast'\)"),
        ("length.of=3", r"--set: 'length'"),
    ],
)
def test_a_bad_setting_is_named(make_config: MakeConfig, setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        assigned(make_config(), [setting], source="--set")
    assert "\n" not in str(caught.value)


def test_the_command_takes_them() -> None:
    command, bound, _ = app.parse_args(
        ["train", "run.toml", "--set", "optim.beta1=0.8", "--set", "length=1 steps", "--changed-config"]
    )
    assert command.__name__ == "train"
    assert bound.arguments["settings"] == ["optim.beta1=0.8", "length=1 steps"]
    assert bound.arguments["changed_config"]
