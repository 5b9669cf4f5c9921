"""A folder of checkpoints belongs to one run, wherever that run's own folder lies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.errors import UserError
from train import checkpoint
from train.checkpoint.ownership import IDENTITY
from train.config import RunConfig
from train.launch import prepare
from train.loop import fit, resumed
from train.state import TrainingState, build

MakeConfig = Callable[..., RunConfig]


def tables(tmp_path: Path, rate: float = 1e-3) -> dict[str, Any]:
    return {
        "length": "2 steps",
        "checkpoint": {"every": "1 steps", "folder": str(tmp_path / "kept")},
        "optim": {"learning_rate": rate},
    }


def begun(config: RunConfig, run: Path) -> TrainingState:
    """Stop after the first step, with a checkpoint."""
    prepare(config, run, 1)
    state = resumed(build(config, run), run)
    fit(state, run, lambda: state.step == 1)
    return state


def test_a_second_run_keeps_out(tmp_path: Path, make_config: MakeConfig) -> None:
    """Of the very same configuration; what the first has kept stays as it is."""
    config = make_config(**tables(tmp_path))
    begun(config, tmp_path / "first")
    kept = {path: path.read_bytes() for path in (tmp_path / "kept").rglob("*") if path.is_file()}
    prepare(config, tmp_path / "second", 1)
    with pytest.raises(UserError, match=f"of another run .{tmp_path / 'first'} on ") as caught:
        resumed(build(config, tmp_path / "second"), tmp_path / "second")
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in (tmp_path / "kept").rglob("*") if path.is_file()} == kept


def test_it_goes_on_from_another_place(tmp_path: Path, make_config: MakeConfig) -> None:
    """Its folder moved; or lost, and made anew of what lies beside the checkpoints."""
    config, there = make_config(**tables(tmp_path)), tmp_path / "kept"
    begun(config, tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    assert resumed(build(config, tmp_path / "moved"), tmp_path / "moved").step == 1
    assert json.loads((there / IDENTITY).read_text())["run"] == str(tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved")
    (tmp_path / "found").mkdir()
    for name in ("config.json", "tokenizer.json", IDENTITY):
        shutil.copy(there / name, tmp_path / "found")
    assert prepare(config, tmp_path / "found", 1) is None
    assert resumed(build(config, tmp_path / "found"), tmp_path / "found").step == 1


def test_what_nobody_has_signed_is_left_alone(tmp_path: Path, make_config: MakeConfig) -> None:
    """Checkpoints in another run's own folder; copied ones are taken once the run's identity lies beside them."""
    inside = make_config(**{**tables(tmp_path), "checkpoint": {"every": "1 steps"}})
    begun(inside, tmp_path / "first")
    config, run = make_config(**tables(tmp_path)), tmp_path / "second"
    shutil.copytree(tmp_path / "first" / "checkpoints", tmp_path / "kept")
    prepare(config, run, 1)
    with pytest.raises(UserError, match=f"no {IDENTITY} that says whose"):
        resumed(build(config, run), run)
    shutil.copy(run / IDENTITY, tmp_path / "kept")
    assert resumed(build(config, run), run).step == 1


def test_a_damaged_identity_is_named(tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config(**tables(tmp_path))
    prepare(config, tmp_path / "run", 1)
    (tmp_path / "run" / IDENTITY).write_text('{"id": ""}')
    with pytest.raises(UserError, match=rf"{IDENTITY}: 'id'"):
        checkpoint.claim(config, tmp_path / "run")


def test_a_refused_change_leaves_the_run_as_it_was(tmp_path: Path, make_config: MakeConfig) -> None:
    """The changed start is refused for its suite; the command as before goes on."""
    config, run = make_config(**tables(tmp_path)), tmp_path / "run"
    changed = make_config(**tables(tmp_path, rate=1e-4), evaluate={"suite": str(tmp_path / "none")})
    begun(config, run)
    with pytest.raises(UserError):
        prepare(changed, run, 1, may_change=True)
    assert prepare(config, run, 1) is None
    assert resumed(build(config, run), run).step == 1


def test_a_kill_between_two_writes_is_mended(tmp_path: Path, make_config: MakeConfig) -> None:
    """Either folder may have the changed configuration alone; what makes another run stays refused."""
    config, run = make_config(**tables(tmp_path)), tmp_path / "run"
    changed = make_config(**tables(tmp_path, rate=1e-4))
    begun(config, run)
    beside = tmp_path / "kept" / "config.json"
    beside.write_text(changed.model_dump_json())
    assert resumed(build(config, run), run).step == 1
    assert beside.read_bytes() == (run / "config.json").read_bytes()
    assert prepare(changed, run, 1, may_change=True) is None
    assert resumed(build(changed, run), run).step == 1
    assert beside.read_bytes() == (run / "config.json").read_bytes()
    beside.write_text(make_config(**{**tables(tmp_path, rate=1e-4), "length": "9 steps"}).model_dump_json())
    with pytest.raises(UserError, match=r"under another configuration \(length: '9 steps' there, '2 steps' now\)"):
        checkpoint.claim(changed, run)
