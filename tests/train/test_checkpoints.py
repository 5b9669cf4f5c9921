"""Checkpoints on disk: whole or not there, checked, never code, kept by policy, on any storage."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file

from infra.errors import RunError, UserError
from infra.storage import Folder
from train import checkpoint
from train.checkpoint.retention import kept
from train.config import RunConfig
from train.evaluate.run import load_model
from train.launch import prepare
from train.loop import fit, resumed
from train.state import TrainingState, build

MakeConfig = Callable[..., RunConfig]


def run_here(config: RunConfig, run: Path) -> TrainingState:
    """Train to the end in this process."""
    if not (run / "config.json").exists():
        prepare(config, run, 1)
    state = resumed(build(config, run), run)
    fit(state, run, lambda: False)
    return state


def steps(folder: Path) -> list[int]:
    return [one.step for one in checkpoint.saved(folder)]


@pytest.fixture
def done(finished: Path, make_config: MakeConfig, tmp_path: Path) -> Path:
    """A copy of a finished run, with checkpoints of steps 8 and 12."""
    if not finished.exists():
        run_here(make_config(), finished)
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def test_its_files_are_what_anyone_can_read(done: Path) -> None:
    newest = Path(checkpoint.saved(done / "checkpoints")[-1].path)
    state = checkpoint.load(newest)
    plain = load_file(newest / "rank-00000.safetensors")
    assert sorted(path.name for path in newest.iterdir()) == ["meta.json", "rank-00000.safetensors"]
    for name, value in state["model"].items():
        assert torch.equal(plain[f"model.{name}"], value)
    assert {"exp_avg", "exp_avg_sq", "step"} == {name.rpartition(".")[2] for name in state["optimizer"]}
    assert state["average"].keys() == state["model"].keys()
    assert state["step"] == 12
    assert (state["data"]["epoch"], state["data"]["step"]) == (2, 0)
    assert state["metrics"]["step"] == 12
    assert set(checkpoint.load(newest, ["model"])) & {"model", "average", "optimizer"} == {"model"}


def test_a_clock_may_ask_for_it(tmp_path: Path, make_config: MakeConfig) -> None:
    """So many seconds after the last, whatever the step; an interval that is always over gives one a step."""
    config = make_config(length="5 steps", checkpoint={"every": "5 steps", "every_s": 1e-9, "keep": 9})
    run_here(config, tmp_path)
    assert steps(tmp_path / "checkpoints") == [1, 2, 3, 4, 5]


def test_synchronous_saves_leave_the_same(tmp_path: Path, done: Path, make_config: MakeConfig) -> None:
    run_here(make_config(checkpoint={"every": "4 steps", "asynchronous": False}), tmp_path / "other")
    for one in ("step-00000008", "step-00000012"):
        ours, theirs = (run / "checkpoints" / one / "rank-00000.safetensors" for run in (tmp_path / "other", done))
        assert ours.read_bytes() == theirs.read_bytes()


def test_some_are_kept_for_ever(tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config(checkpoint={"every": "1 steps", "keep": 2, "keep_every": "5 steps"})
    run_here(config, tmp_path)
    assert steps(tmp_path / "checkpoints") == [5, 10, 11, 12]


@given(st.sets(st.integers(0, 200)), st.integers(1, 5), st.integers(0, 30))
def test_what_is_kept(taken: set[int], newest: int, every: int) -> None:
    """The newest, and one of each stretch of `every` that has any; what remains stays when more are taken."""
    stay = kept(taken, newest, every)
    assert set(sorted(taken)[-newest:]) <= stay <= taken
    for_ever = stay - set(sorted(taken)[-newest:])
    if not every:
        assert not for_ever
        return
    assert len({step // every for step in for_ever}) == len(for_ever)
    assert {step // every for step in taken if step >= every} == {step // every for step in stay if step >= every}
    assert for_ever <= kept(stay | {max(taken, default=0) + 1}, newest, every)


def test_without_its_marker_there_is_none(done: Path, make_config: MakeConfig) -> None:
    folder = done / "checkpoints"
    for one in checkpoint.saved(folder):
        (Path(one.path) / checkpoint.META).unlink()
    (folder / ".tmp-step-00000016").mkdir()
    assert checkpoint.saved(folder) == []
    assert checkpoint.load_newest(folder) is None
    run_here(make_config(), done)  # from the start; what was left is taken away
    assert steps(folder) == [8, 12]
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000008", "step-00000012"]


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def claim_too_much(path: Path) -> None:
    meta = json.loads(path.read_bytes())
    meta["tensors"]["model.logit_scale"]["shape"] = [2**40]
    path.write_text(json.dumps(meta))


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("rank-00000.safetensors", shorten, "bytes where"),
        ("rank-00000.safetensors", flip, "are not those written"),
        ("rank-00000.safetensors", Path.unlink, "missing"),
        ("meta.json", shorten, "meta.json: damaged"),
        ("meta.json", claim_too_much, "model.logit_scale is not covered"),
    ],
)
def test_a_torn_one_is_passed_over(
    done: Path,
    make_config: MakeConfig,
    caplog: pytest.LogCaptureFixture,
    file: str,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    """The one before is taken, and the warning says why; with that one torn too the run does not start anew."""
    older, newest = (Path(one.path) for one in checkpoint.saved(done / "checkpoints"))
    damage(newest / file)
    assert resumed(build(make_config(), done), done).step == 8
    assert "going back to the one before" in caplog.text
    assert message in caplog.text
    damage(older / file)
    with pytest.raises(RunError, match="none of its 2 checkpoints is sound"):
        resumed(build(make_config(), done), done)


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.made),))


@pytest.mark.parametrize("file", ["rank-00000.safetensors", "meta.json", ".metadata", "state.pt"])
def test_a_pickle_where_weights_were_expected_is_never_run(
    done: Path, tmp_path: Path, make_config: MakeConfig, caplog: pytest.LogCaptureFixture, file: str
) -> None:
    """In the place of any file, and under the names that other formats have: refused in one line, or not looked at."""
    evil = pickle.dumps(Payload(tmp_path / "made"))
    pickle.loads(evil)  # noqa: S301 - so it would do harm
    (tmp_path / "made").rmdir()
    newest = Path(checkpoint.saved(done / "checkpoints")[-1].path)
    known = (newest / file).exists()
    (newest / file).write_bytes(evil)
    assert resumed(build(make_config(), done), done).step == (8 if known else 12)
    assert caplog.text.count("passed over") == known
    if known:
        with pytest.raises(checkpoint.TornCheckpointError) as caught:
            checkpoint.load(newest)
        assert "\n" not in str(caught.value)
        assert file in str(caught.value)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "name",
    ["../../../rank-00000.safetensors", "/etc/passwd", "..", ".hidden", "", "a\\b", "s3://a/b", "meta.json", "a/b"],
)
def test_a_file_name_cannot_leave_the_checkpoint(
    done: Path, make_config: MakeConfig, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """It is refused as torn before any file of that name is looked at."""
    newest = Path(checkpoint.saved(done / "checkpoints")[-1].path)
    meta = json.loads((newest / "meta.json").read_text().replace("rank-00000.safetensors", json.dumps(name)[1:-1]))
    (newest / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(checkpoint.TornCheckpointError, match="is no name of a checkpoint's file") as caught:
        checkpoint.load(newest)
    assert "\n" not in str(caught.value)
    assert resumed(build(make_config(), done), done).step == 8
    assert "is no name of a checkpoint's file" in caplog.text


BLOCKS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 3), st.integers(0, 3)), max_size=5)


@settings(deadline=None, max_examples=300)
@given(blocks=BLOCKS)
@example(blocks=[(0, 0, 2, 4), (2, 0, 2, 4)])
@example(blocks=[(0, 0, 4, 2), (0, 1, 4, 2)])
def test_chunks_tile_their_tensor(blocks: list[tuple[int, int, int, int]]) -> None:
    """Whatever chunks a `meta.json` has: it is sound if and only if each element lies in exactly one."""
    counts = torch.zeros(8, 8, dtype=torch.int64)
    for top, left, height, width in blocks:
        counts[top : top + height, left : left + width] += 1
    chunks = [{"offsets": block[:2], "shape": block[2:], "file": "a", "start": 8, "sha256": ""} for block in blocks]
    tensor = {"dtype": "U8", "shape": [4, 4], "chunks": chunks}
    meta = {"format": 3, "step": 1, "values": {}, "files": {"a": 99}, "tensors": {"w": tensor}}
    tiled = bool((counts[:4, :4] == 1).all()) and int(counts.sum()) == 16
    inside = all(top + height <= 4 and left + width <= 4 for top, left, height, width in blocks)
    if tiled and inside:
        checkpoint.Meta.model_validate(meta)
    else:
        with pytest.raises(ValidationError, match=r"covered|overlap|outside"):
            checkpoint.Meta.model_validate(meta)


def test_overlapping_chunks_are_refused(done: Path) -> None:
    """As many elements as the tensor has, but one of them twice and one never."""
    newest = Path(checkpoint.saved(done / "checkpoints")[-1].path)
    meta = json.loads((newest / "meta.json").read_text())
    name, entry = next((name, one) for name, one in meta["tensors"].items() if len(one["shape"]) == 2)
    rows, columns = entry["shape"]
    half = entry["chunks"][0] | {"shape": [1, columns]}
    entry["chunks"] = [half | {"offsets": [max(0, row - 1), 0]} for row in range(rows)]
    (newest / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(checkpoint.TornCheckpointError, match=rf"chunks of {re.escape(name)} overlap"):
        checkpoint.load(newest)


def test_one_of_an_earlier_version_is_named(done: Path) -> None:
    newest = Path(checkpoint.saved(done / "checkpoints")[-1].path)
    (newest / "meta.json").write_text('{"step": 12, "bytes": 3, "sha256": "aa"}')
    with pytest.raises(checkpoint.TornCheckpointError, match="of another version of Pairmill"):
        checkpoint.load(newest)


@pytest.mark.parametrize("storage", ["memory", "s3"])
def test_any_storage(
    storage: str, tmp_path: Path, done: Path, make_config: MakeConfig, request: pytest.FixtureRequest
) -> None:
    """Found through the run and on its own; an upload that broke off does not exist; another run keeps out."""
    url = "memory://checkpoints-of-a-run"
    if storage == "s3":
        url = request.getfixturevalue("s3_url")
    config = make_config(checkpoint={"every": "4 steps", "folder": url})
    run = tmp_path / "elsewhere"
    run_here(config, run)
    folder = Folder(url)
    assert [one.step for one in checkpoint.saved(folder)] == [8, 12]
    assert not (run / "checkpoints").exists()
    here = checkpoint.load(checkpoint.saved(done / "checkpoints")[-1].path)
    for where in (run, url, f"{url}/step-00000012"):
        model, _, _, state = load_model(where)
        assert state["step"] == 12
        assert all(torch.equal(value, here["average"][name]) for name, value in model.state_dict().items())
    (folder / "step-00000012").delete(checkpoint.META)
    state = resumed(build(config, run), run)
    assert state.step == 8
    fit(state, run, lambda: False)
    assert [one.step for one in checkpoint.saved(folder)] == [8, 12]
    other = make_config(length="13 steps", checkpoint={"folder": url})
    prepare(other, tmp_path / "other", 1)
    with pytest.raises(UserError, match="holds checkpoints of another run"):
        resumed(build(other, tmp_path / "other"), tmp_path / "other")
    folder.delete_tree()
