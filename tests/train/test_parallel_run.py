"""A whole run with sharded weights and micro batches logs what a plain one logs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from train.config import RunConfig
from train.launch import train


def test_sharded_run_learns_what_a_plain_one_does(tmp_path: Path, make_config: Callable[..., RunConfig]) -> None:
    """Two ranks with shards of the weights, of AdamW's state and of the averages, four samples at a time."""
    checkpoint = {"every": "100%"}
    plain = {"length": "5 steps", "checkpoint": checkpoint}
    sharded = {"strategy": "fsdp", "micro_batch": 4, "checkpoint_activations": True}
    train(make_config(**plain), tmp_path / "plain", 1)
    train(make_config(**plain, parallel=sharded), tmp_path / "sharded", 2)
    lines = [(tmp_path / run / "log.jsonl").read_text().splitlines() for run in ("plain", "sharded")]
    assert len(lines[0]) == len(lines[1]) == 5
    for one, other in zip(*(map(json.loads, run) for run in lines), strict=True):
        for name in ("loss", "gradient_norm", "temperature"):
            assert other[name] == pytest.approx(one[name], rel=1e-3), (name, one["step"])
