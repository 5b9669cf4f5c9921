"""The trainer's benchmarks at a small size: they run, and what they print holds together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def printed(script: str, *options: object) -> dict[str, Any]:
    """Run a benchmark on this checkout and return the object that it prints."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, options)]
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    ran = subprocess.run(command, capture_output=True, text=True, env=env)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell a peak")
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_loss_memory(name: str) -> None:
    """Both sides compute the same loss, and the whole matrix is in the memory of one of them alone."""
    rows, matrix = 4096, 4 * 4096**2
    sizes = ("--rows", rows, "--width", 16, "--tile", 256)
    found = printed("loss_memory.py", *sizes, "--threads", 1, "--repeats", 1, "--objectives", name)[name]
    tiled, whole = found["tiled"], found["whole"]
    assert not found["extrapolated"]
    assert tiled["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    assert 0 < tiled["bytes"] < matrix / 2 < matrix < whole["bytes"] == found["whole_bytes"]
    assert found["memory_share"] == pytest.approx(tiled["bytes"] / whole["bytes"])
    assert found["time_share"] == pytest.approx(tiled["cpu_seconds"] / whole["cpu_seconds"])
    assert min(tiled["seconds"], tiled["cpu_seconds"], whole["seconds"], whole["cpu_seconds"]) > 0


@pytest.mark.slow
def test_train_step() -> None:
    """Both sides begin with the same loss, and go on from it alike."""
    found = printed("train_step.py", "--models", "ViT-S-32", "--batch", 2, "--steps", 1, "--threads", 1)["ViT-S-32"]
    ours, theirs = found["first_losses"]["pairmill"], found["first_losses"]["open_clip"]
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert ours[1] != ours[0]
    for ratio, share in (("ratio", "share_of_open_clip"), ("ratio_without_optimizer", "share_without_optimizer")):
        assert found[ratio] == pytest.approx(1 / found[share], abs=0.01)


@pytest.mark.slow
def test_train_card_on_a_cpu() -> None:
    sizes = ("--models", "ViT-nano", "--batch", 16, "--steps", 3, "--samples", 64, "--workers", 0)
    found = printed("train_card.py", *sizes, "--without-open-clip", "--no-compile")["ViT-nano"]
    assert found["text_tokens"] == 16
    assert found["fed_share_of_synthetic"] == pytest.approx(
        found["a_second"]["fed"] / found["a_second"]["synthetic"], abs=0.1
    )


def test_recipe_cost() -> None:
    """Half the speed is twice the hours, at the same price an hour."""
    aimed_at = printed("recipe_cost.py")["clip-vit-b-32"]
    measured = printed("recipe_cost.py", "--speed", f"ViT-B-32={aimed_at['a_card_s'] / 2}")["clip-vit-b-32"]
    assert (aimed_at["samples"], aimed_at["is_measured"]) == (12_800_000_000, False)
    assert measured["is_measured"]
    assert measured["hours"] == pytest.approx(2 * aimed_at["hours"], rel=0.02)
    assert measured["cost"] == pytest.approx(2 * aimed_at["cost"], rel=0.02)
