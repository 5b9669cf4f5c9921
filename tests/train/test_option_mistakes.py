"""Values of a run's options that cannot work: each is refused in one line, before a process is started for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.config import assigned
from infra.errors import UserError
from train.config import CheckpointConfig, DataConfig, RunConfig
from train.launch import prepare, train
from train.writable import check_checkpoint_folder, check_stream_cache

MakeConfig = Callable[..., RunConfig]


@pytest.mark.parametrize(
    "setting",
    [
        "model.temperature=inf",
        "model.temperature=nan",
        "objective.caption_weight=inf",
        "optim.learning_rate=inf",
        "parallel.timeout_s=inf",
        "parallel.timeout_s=1e12",
        "data.seed=18446744073709551616",
        "model.vision.widths=[0, 8]",
        "model.vision.depths=[1, -1]",
        "augment.crop_scale=[0, 0]",
        "augment.crop_scale=[1.0, 0.5]",
        "augment.crop_ratio=[0, 1]",
        "length=0 steps",
        "length=0.0 epochs",
        "length=5%",
    ],
)
def test_a_value_out_of_range_is_named(make_config: MakeConfig, setting: str) -> None:
    key = setting.partition("=")[0]
    with pytest.raises(UserError, match=rf"^--set: '{key}[.\d]*': ") as caught:
        assigned(make_config(), [setting], source="--set")
    assert "\n" not in str(caught.value)


def test_an_image_tower_without_stages_is_refused(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"'model.vision.widths': "):
        make_config(model={"vision": {"widths": [], "depths": []}})


def test_a_length_of_more_than_a_number_holds_is_refused(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"'length': .*too large a number"):
        make_config(length=f"{'9' * 400} steps")


@pytest.mark.parametrize("length", ["5 samples", "0.001 epochs"])
def test_a_length_is_one_step_at_least(tmp_path: Path, make_config: MakeConfig, length: str) -> None:
    with pytest.raises(UserError, match=rf"length: '{length}' is less than one step of 16 samples"):
        prepare(make_config(length=length), tmp_path / "run", 1)


@pytest.mark.parametrize("objective", ["clip", "captioning"])
def test_a_temperature_below_the_bound_is_refused(tmp_path: Path, make_config: MakeConfig, objective: str) -> None:
    """The first step would raise it; SigLIP's has no bound."""
    tables = {"objective": {"name": objective}, "model": {"temperature": 0.005}}
    with pytest.raises(
        UserError, match=r"^model\.temperature: 0\.005, but '\w+' keeps it at 0\.01 or more; take"
    ) as caught:
        prepare(make_config(**tables), tmp_path / "run", 1)
    assert "\n" not in str(caught.value)
    tables["model"]["temperature"] = 0.01
    prepare(make_config(**tables), tmp_path / "run", 1)
    siglip = make_config(objective={"name": "siglip"}, model={"temperature": 0.005, "logit_bias": -10.0})
    prepare(siglip, tmp_path / "siglip", 1)


def test_a_warm_up_longer_than_the_run_is_warned_of(
    tmp_path: Path, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    for warmup, lines in (("12 steps", 0), ("13 steps", 1)):
        prepare(make_config(optim={"warmup": warmup}), tmp_path / warmup, 1)
        assert [record.levelname for record in caplog.records].count("WARNING") == lines
    assert "optim.warmup: '13 steps' is longer than the run ('12 steps'), so it never" in caplog.text


def test_ways_up_and_down_longer_than_the_run_are_refused(tmp_path: Path, make_config: MakeConfig) -> None:
    optim = {"schedule": "wsd", "warmup": "3 steps", "decay": "9 steps"}
    prepare(make_config(optim=optim), tmp_path / "fits", 1)
    with pytest.raises(
        UserError, match=r"^optim\.decay: '10 steps', with optim\.warmup '3 steps', is longer than the run"
    ):
        prepare(make_config(optim=optim | {"decay": "10 steps"}), tmp_path / "run", 1)
    prepare(make_config(optim=optim | {"decay": "10 steps", "schedule": "cosine"}), tmp_path / "run", 1)


TOWER = {"widths": [4, 8], "depths": [1, 1]}


@pytest.mark.parametrize(
    ("tables", "nproc", "message"),
    [
        ({"vision": {**TOWER, "statistics_group": 1}}, 1, r"^model\.vision\.statistics_group: .*; take 2 or more$"),
        ({"name": "RN-nano", "statistics_group": 1}, 1, r"^model\.statistics_group: .*; take 2 or more$"),
        ({"vision": TOWER}, 16, r"^data\.global_batch_size: .*; 16 samples over 16 ranks .*: take fewer ranks$"),
    ],
)
def test_statistics_of_one_value_are_refused(
    tmp_path: Path, make_config: MakeConfig, tables: dict[str, Any], nproc: int, message: str
) -> None:
    side = 32 if "name" in tables else 16
    with pytest.raises(UserError, match=message) as caught:
        prepare(make_config(data={"image_size": side}, model=tables), tmp_path / "run", nproc)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "tables",
    [
        {"vision": {**TOWER, "statistics_group": 1, "pool_grid": 2}},
        {"vision": {}, "vit": {"image_size": 16, "patch_size": 4, "width": 16, "layers": 1, "heads": 2}},
    ],
)
def test_statistics_of_one_sample_may_be_of_many_values(
    tmp_path: Path, make_config: MakeConfig, tables: dict[str, Any]
) -> None:
    prepare(make_config(model=tables), tmp_path / "run", 16)


@pytest.mark.parametrize("place", ["a file", "below a file", "not to be written to"])
def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    folder = {
        "a file": str(tmp_path / "file"),
        "below a file": str(tmp_path / "file" / "inside"),
        "not to be written to": "/proc/pairmill",
    }[place]
    with pytest.raises(UserError, match=rf"^checkpoint.folder: {folder} cannot be written to "):
        check_checkpoint_folder(CheckpointConfig(folder=folder))
    with pytest.raises(UserError, match=rf"^data.stream_cache: {folder} cannot be written to "):
        check_stream_cache(DataConfig(stream_cache=folder))
    assert (tmp_path / "file").read_text() == "mine"


def test_nothing_is_left_of_the_trial(tmp_path: Path) -> None:
    check_checkpoint_folder(CheckpointConfig(folder=str(tmp_path / "there")))
    assert list((tmp_path / "there").iterdir()) == []


def test_a_cache_at_a_url_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.stream_cache: s3://bucket/cache is no local folder"):
        check_stream_cache(DataConfig(stream_cache="s3://bucket/cache"))


@pytest.mark.parametrize("tables", [{"checkpoint": {"folder": "/proc/a"}}, {"data": {"stream_cache": "/proc/a"}}])
def test_a_run_tries_its_places_first(tmp_path: Path, make_config: MakeConfig, tables: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r": /proc/a cannot be written to ") as caught:
        train(make_config(**tables), tmp_path / "run", 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("run", ["s3://bucket/run", Path("s3://bucket/run")])
def test_a_run_at_a_url_is_refused(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, run: str | Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--run s3:.*bucket/run: .* checkpoint.folder"):
        train(make_config(), run, 1)
    assert list(tmp_path.iterdir()) == []
