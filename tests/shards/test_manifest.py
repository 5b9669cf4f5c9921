"""The manifest: going on with a corpus that was begun before an option existed, and stages taken back."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field

from infra.config import Config, completed, differences, essence, knob
from infra.errors import UserError
from infra.storage import Folder
from shards.layout import DEDUP, FINAL, PLAN, RAW
from shards.manifest import STAGES, Manifest


class Inner(Config):
    size: int = Field(256, description="pixels")


class Before(Config):
    rows: int = Field(description="needed")
    seed: int = Field(0, description="of the order")
    inner: Inner = Field(Inner(size=128), description="pictures")


class InnerNow(Inner):
    format: str = Field("jpg", description="of pictures")
    threads: int = knob(4, "how the work is done")


class Settings(Config):
    steps: tuple[str, ...] = Field(("one", "two"), description="a list")
    strength: float = Field(0.5, description="a number")


class Now(Config):
    rows: int = Field(description="needed")
    seed: int = Field(0, description="of the order")
    inner: InnerNow = Field(InnerNow(size=128), description="pictures")
    filters: Settings = Field(Settings(strength=0.25), description="a new table")
    limit: int | None = Field(None, description="a new option")


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    folder = Folder(tmp_path / "corpus")
    Manifest.open(folder).begin(PLAN, Before(rows=7, inner=Inner(size=64)))
    return Manifest.existing(folder)


def test_a_younger_option_counts_as_its_default(manifest: Manifest) -> None:
    manifest.begin(PLAN, Now(rows=7, inner=InnerNow(size=64)))
    manifest.begin(PLAN, Now(rows=7, inner=InnerNow(size=64, threads=9)))


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (Now(rows=7, inner=InnerNow(size=64), limit=3), "limit: None there, 3 now"),
        (Now(rows=7, inner=InnerNow(size=64, format="webp")), "inner.format: 'jpg' there, 'webp' now"),
        (Now(rows=7, inner=InnerNow(size=64), filters=Settings()), "filters.strength: 0.25 there, 0.5 now"),
        (Now(rows=8, inner=InnerNow(size=64)), "rows: 7 there, 8 now"),
        (Now(rows=7), "inner.size: 64 there, 128 now"),
        (Inner(), "rows: 7 there, None now"),
    ],
)
def test_any_other_value_is_a_difference(manifest: Manifest, config: Config, what: str) -> None:
    with pytest.raises(UserError, match="made with another configuration") as caught:
        manifest.begin(PLAN, config)
    assert what in str(caught.value)


def test_what_is_recorded_today_is_complete() -> None:
    now = Now(rows=1, limit=5, inner=InnerNow(size=3))
    assert completed(essence(now), Now) == essence(now)
    assert differences(completed({"rows": 1, "inner": {"size": 3}, "limit": 5}, Now), essence(now)) == []


def test_taking_a_stage_back_takes_back_those_after_it(tmp_path: Path) -> None:
    manifest = Manifest.open(Folder(tmp_path / "corpus"))
    for stage in STAGES:
        manifest.begin(stage, Config())
        manifest.finish(stage, {"rows_in": 1})
    manifest.reopen(DEDUP)
    again = Manifest.existing(manifest.folder)
    assert [stage for stage in STAGES if again.is_done(stage)] == [PLAN, RAW]
    assert again.totals(FINAL) == {}
    with pytest.raises(UserError, match="'dedup' is not finished yet"):
        again.begin(FINAL, Config())
