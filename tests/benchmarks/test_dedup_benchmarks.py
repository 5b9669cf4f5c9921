"""The benchmarks of dedup at a small size: each runs, and what it prints holds together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run(script: str, *options: str) -> Any:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *options]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_pairs_of_hashes() -> None:
    found = run("hamming_pairs.py", "--size", "20000", "--peer-size", "4000", "--planted", "300")
    assert found["recall"] == 1
    assert found["pairs"] >= 300
    assert {name: one["recall"] for name, one in found["beside"].items()} == {
        "ours": 1, "faiss_flat": 1, "faiss_multi_hash": 1,
    }  # fmt: skip


def test_projection() -> None:
    found = run("dedup_projection.py", "--measured", "20000", "--samples", "50000000")
    one, ten = (found["nodes"][nodes] for nodes in ("1", "10"))
    assert set(one) == set(ten) == set(found["cpu_hours"])
    assert all(0 <= ten[name]["hours"] <= one[name]["hours"] for name in one)
    assert one["near_hashes"]["shuffled_GB"] > 50e6 * 36 / 1e9
    assert found["ratio_of_pairs"] > 0


def test_planted_copies() -> None:
    if not (Path(sys.prefix) / "imagededup").is_dir():
        pytest.skip("imagededup is not here; `make bench` gets it")
    found = run("planted_copies.py", "--count", "40", "--copied", "10")
    assert (found["pictures"], found["copied"]) == (40, 10)
    ours = found["within_80"]
    assert ours["false_pairs"] == 0
    assert {way: ours["recall"][way] for way in ("resize", "jpeg_50", "webp", "greyscale")} == {
        "resize": 1, "jpeg_50": 1, "webp": 1, "greyscale": 1,
    }  # fmt: skip
    assert all(peer["at_10"]["mean"] > 0.5 for peer in found["peers"].values())


def test_components() -> None:
    found = run("components_scale.py", "--edges", "200000", "--nodes", "100000", "--parts", "4")
    assert found["equal"] is True
    assert found["ours"]["components"] == found["scipy"]["components"] > 1000


def test_pairs_of_embeddings() -> None:
    found = run("semantic_pairs.py", "--size", "3000", "--width", "16")
    assert found["only_ours"] == 0
    assert found["found"] <= found["pairs"] > 50
    assert found["recall"] == found["found"] / found["pairs"] > 0.95


def test_the_sheet_of_thresholds() -> None:
    found = run("threshold_sheet.py", "--hashes", "5000", "--embeddings", "2000", "--width", "16", "--sheet", "100")
    assert all(found[f"{kind}_cpu_s"][side] > 0 for kind in ("hash", "embedding") for side in ("sheet", "pairs"))
