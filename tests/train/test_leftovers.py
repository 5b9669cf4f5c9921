"""What a removal or a write that broke off leaves behind: no checkpoint, and no part of the next one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from infra.storage import Folder
from train import checkpoint
from train.checkpoint.retention import prune
from train.config import RunConfig
from train.launch import prepare
from train.state import build


def test_one_half_removed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk goes away before the first tensor is removed: the commit is gone already."""
    for step in (1, 2):
        (tmp_path / f"step-{step:08d}").mkdir()
        for name in (checkpoint.META, "rank-00000.safetensors"):
            (tmp_path / f"step-{step:08d}" / name).touch()

    def break_off(folder: Folder) -> None:
        raise OSError(f"{folder.url}: gone")

    monkeypatch.setattr(Folder, "delete_tree", break_off)
    with pytest.raises(OSError, match="step-00000001: gone"):
        prune(Folder(tmp_path), 2, newest=1)
    assert [one.step for one in checkpoint.saved(tmp_path)] == [2]
    assert [path.name for path in (tmp_path / "step-00000001").iterdir()] == ["rank-00000.safetensors"]


@pytest.mark.parametrize("is_local", [True, False])
def test_a_new_one_has_its_own_files_only(
    is_local: bool, tmp_path: Path, make_config: Callable[..., RunConfig]
) -> None:
    """A file of a rank that there is no more lies in the place of the next checkpoint."""
    url = str(tmp_path / "checkpoints") if is_local else "memory://leftovers"
    config = make_config(checkpoint={"every": "100 steps", "folder": url})
    prepare(config, tmp_path / "run", 1)
    state, folder = build(config, tmp_path / "run"), Folder(url)
    with checkpoint.Saver(state, tmp_path / "run") as saver:
        state.step = 1
        place = folder / (".tmp-step-00000001" if is_local else "step-00000001")
        with place.create("rank-00007.safetensors") as left:
            left.write(b"left")
        saver.save()
    (one,) = checkpoint.saved(folder)
    assert Folder(one.path).names() == [checkpoint.META, "rank-00000.safetensors"]
    folder.delete_tree()
