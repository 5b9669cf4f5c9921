"""`meta.json` vouches for itself: what is changed in it, or missing from it, makes a torn checkpoint."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.storage import Folder
from train import checkpoint
from train.checkpoint.layout import begun
from train.checkpoint.retention import prune
from train.checkpoint.storage import CheckpointReader
from train.config import RunConfig
from train.launch import prepare
from train.loop import fit, resumed
from train.state import build

MakeConfig = Callable[..., RunConfig]
TABLES = {"length": "2 steps", "checkpoint": {"every": "1 steps"}}


@pytest.fixture
def done(finished: Path, make_config: MakeConfig, tmp_path: Path) -> Path:
    """A copy of a finished run, with checkpoints of steps 1 and 2."""
    if not finished.exists():
        prepare(make_config(**TABLES), finished, 1)
        fit(build(make_config(**TABLES), finished), finished, lambda: False)
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def newest(run: Path) -> checkpoint.Saved:
    return checkpoint.saved(run / "checkpoints")[-1]


def test_a_flipped_bit_anywhere_is_seen(done: Path) -> None:
    """Or means the same, as `E` does in a number."""
    one = newest(done)
    path, sound = Path(one.path) / "meta.json", one.meta()
    data = path.read_bytes()
    places = random.Random(5)
    seen = 0
    for place in places.sample(range(len(data)), 300):
        flipped = bytearray(data)
        flipped[place] ^= 1 << places.randrange(8)
        path.write_bytes(flipped)
        try:
            assert one.meta() == sound, place
        except checkpoint.TornCheckpointError:
            seen += 1
    assert seen > 250


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"model.logit_scale"', '"model.logit_scalf"'),
        ('"optimizer.logit_scale.exp_avg"', '"optimizer.logit_scale.exp_awg"'),
        ('"samples": 32', '"samples": 33'),
        ('"values"', '"valuer"'),
        ('"sha256": "', '"sha257": "'),
    ],
)
def test_a_changed_name_or_value_is_passed_over(
    done: Path, make_config: MakeConfig, caplog: pytest.LogCaptureFixture, before: str, after: str
) -> None:
    path = Path(newest(done).path) / "meta.json"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    state = resumed(build(make_config(**TABLES), done), done)
    assert (state.step, state.torn) == (1, {2})
    assert f"{path}: damaged" in caplog.text


def without_table(meta: dict[str, Any], table: str) -> None:
    meta["tensors"] = {name: one for name, one in meta["tensors"].items() if not name.startswith(table)}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda meta: meta["values"].pop("samples"), "values.samples is missing"),
        (lambda meta: meta["values"].update(step=1), "values.step is 1, step 2"),
        (lambda meta: meta["tensors"].pop("random"), "random is missing"),
        (lambda meta: meta["tensors"].pop("average.logit_scale"), "logit_scale is in one alone"),
        (lambda meta: meta["tensors"].pop("optimizer.logit_scale.exp_avg"), r"logit_scale\.exp_avg is missing"),
        (lambda meta: without_table(meta, "optimizer."), "optimizer is missing"),
        (lambda meta: without_table(meta, ""), "model is missing"),
    ],
)
def test_what_is_missing_is_named(done: Path, spoil: Callable[[dict[str, Any]], Any], message: str) -> None:
    """Signed as if it had been written so."""
    path = Path(newest(done).path) / "meta.json"
    meta = json.loads(path.read_text())
    spoil(meta)
    path.write_bytes(checkpoint.Meta.model_validate(meta).signed())
    with pytest.raises(checkpoint.TornCheckpointError, match=message):
        newest(done).meta()


def test_a_run_with_averaged_weights_takes_none_without(
    done: Path, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(newest(done).path) / "meta.json"
    meta = json.loads(path.read_text())
    without_table(meta, "average.")
    path.write_bytes(checkpoint.Meta.model_validate(meta).signed())
    assert resumed(build(make_config(**TABLES), done), done).step == 1
    assert "average is missing" in caplog.text


def test_another_step_s_folder_is_torn(done: Path) -> None:
    """A folder that was renamed, or copied over another; under a name that is no step's it is anyone's."""
    path = Path(newest(done).path)
    path.rename(path.with_name("step-00000007"))
    with pytest.raises(checkpoint.TornCheckpointError, match="it is of step 2"):
        newest(done).meta()
    path.with_name("step-00000007").rename(path.with_name("best"))
    assert checkpoint.load(path.with_name("best"), ["model"])["step"] == 2


def test_only_digits_make_a_step(tmp_path: Path) -> None:
    for name in ("step-²", "step-٣", "step-", "step-1x", "step-step-1", "step-00000004"):
        (tmp_path / name).mkdir()
    assert [one.step for one in begun(Folder(tmp_path))] == [4]


def test_later_ones_go_only_if_they_were_found_torn(done: Path) -> None:
    """What another process has written since is not this one's to remove."""
    folder = Folder(done / "checkpoints")
    for step in (3, 4):
        shutil.copytree(newest(done).path, done / "checkpoints" / f"step-{step:08d}")
    prune(folder, 2, newest=1, torn={3})
    assert [one.step for one in begun(folder)] == [2, 4]


def test_a_torn_one_takes_no_sound_one_s_place(done: Path) -> None:
    """Where the first checkpoint after it, taken by time or by a signal, is of a later step."""
    folder = Folder(done / "checkpoints")
    for step in (3, 4):
        shutil.copytree(newest(done).path, done / "checkpoints" / f"step-{step:08d}")
    prune(folder, 4, newest=2, torn={3})
    assert [one.step for one in begun(folder)] == [2, 4]


def a_folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_loop_instead(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def unreadable(path: Path) -> None:
    """A file that opens, and whose bytes are not to be had."""
    path.unlink()
    path.symlink_to("/proc/self/mem")


@pytest.mark.parametrize(
    ("damage", "message"),
    [(a_folder_instead, "Is a directory"), (unreadable, "Invalid argument")],
)
def test_a_file_that_cannot_be_read_makes_a_torn_one(
    done: Path,
    make_config: MakeConfig,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    damage(Path(newest(done).path) / "meta.json")
    state = resumed(build(make_config(**TABLES), done), done)
    assert (state.step, state.torn) == (1, {2})
    assert f"meta.json: cannot be read: {message}" in caplog.text
    fit(state, done, lambda: False)
    assert [one.meta().step for one in checkpoint.saved(done / "checkpoints")] == [1, 2]


@pytest.mark.parametrize("damage", [a_folder_instead, a_loop_instead])
def test_a_file_of_tensors_that_cannot_be_read_is_named(done: Path, damage: Callable[[Path], None]) -> None:
    one = newest(done)
    reader, chunk = CheckpointReader(Folder(one.path), one.meta()), one.meta().tensors["random"].chunks[0]
    damage(Path(one.path) / chunk.file)
    with pytest.raises(checkpoint.TornCheckpointError, match=rf"{chunk.file}: cannot be read: "):
        reader.chunk("random", chunk)


def test_a_torn_one_may_be_a_folder_where_its_commit_was(done: Path) -> None:
    folder = Folder(done / "checkpoints")
    for step in (3, 4):
        shutil.copytree(newest(done).path, done / "checkpoints" / f"step-{step:08d}")
    a_folder_instead(done / "checkpoints" / "step-00000003" / "meta.json")
    prune(folder, 4, newest=2, torn={3})
    assert [one.step for one in begun(folder)] == [2, 4]


def test_one_written_anew_is_torn_no_more(done: Path, make_config: MakeConfig) -> None:
    path = Path(newest(done).path) / "meta.json"
    path.write_bytes(path.read_bytes()[:-1])
    state = resumed(build(make_config(**TABLES), done), done)
    assert state.torn == {2}
    fit(state, done, lambda: False)
    assert state.torn == set()
    assert [one.meta().step for one in checkpoint.saved(done / "checkpoints")] == [1, 2]
