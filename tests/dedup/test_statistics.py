"""What the totals say of distances and components, against counts made the plain way."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedup import run
from dedup.config import DedupConfig
from dedup.outcome import SCHEMA
from dedup.run import dedup
from dedup.statistics import giant, statistics
from infra.cluster import session
from infra.storage import Folder
from shards.layout import DEDUP
from shards.manifest import Manifest
from tests.dedup.corpora import LOCAL, copies, encoded, picture, removed, row_of, write_corpus


def gone(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def row(key: int, component: int, method: str = "exact", distance: int = 0, cosine: float | None = None) -> Any:
    return {
        "key": f"{key:09d}", "kept_key": f"{component:09d}", "method": method, "distance": distance,
        "component": component, "cosine": cosine,
    }  # fmt: skip


def said(low: int, high: int) -> str:
    return f"{low}-{high}" if high > low else str(low)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), max_size=30))
def test_sizes_of_components_are_counted(sizes: list[int]) -> None:
    component = np.repeat(np.cumsum([0, *sizes])[:-1], sizes).astype(np.int64)
    keys = np.array([f"{number:09d}" for number in range(len(component))])
    found: Any = statistics(keys, component, gone([]))
    bounds = [(2, 2), (3, 4), (5, 8), (9, 16), (17, 32), (33, 64)]
    counts = Counter(said(*bound) for size in sizes for bound in bounds if bound[0] <= size <= bound[1])
    assert found["component_sizes"] == counts
    largest = found["largest_components"]
    assert [one["size"] for one in largest] == sorted((size for size in sizes if size > 1), reverse=True)[:10]
    for one in largest:
        assert {component[int(key)] for key in one["keys"]} == {one["component"]}
        assert len(set(one["keys"])) == len(one["keys"]) == min(8, one["size"])


def test_distances_and_cosines_are_counted_by_what_samples_went_for() -> None:
    rows = [
        row(1, 0, "perceptual", 12), row(2, 0, "perceptual", 12), row(3, 0, "perceptual", 31), row(4, 0), row(5, 0),
        row(11, 10, "semantic", 120, 0.95), row(12, 10, "semantic", 90, 0.9549), row(13, 10, "semantic", 99, 1.0),
        row(21, 20, "text", 130), row(31, 31, "test_image", 7, 0.99),
    ]  # fmt: skip
    found: Any = statistics(np.array(["0"] * 40), np.zeros(40, np.int64), gone(rows))
    assert found["distances"] == {"12": 2, "31": 1}
    assert found["cosines"] == {"0.950": 2, "1.000": 1}
    assert found["largest_components"][0]["methods"] == {"exact": 2, "perceptual": 3}


@pytest.mark.parametrize(
    ("size", "rows", "methods", "says"),
    [
        (100, 200, {"perceptual": 99}, ""), (101, 10_100, {"perceptual": 99}, ""),
        (102, 10_100, {"exact": 40, "perceptual": 60}, "lower --distance"),
        (102, 200, {"semantic": 60, "exact": 1}, "higher --semantic.threshold"),
        (102, 200, {"exact": 101}, "placeholder"),
    ],
)  # fmt: skip
def test_a_giant_component_is_warned_of(size: int, rows: int, methods: dict[str, int], says: str) -> None:
    warning = giant({"rows_in": rows, "largest_components": [{"size": size, "methods": methods}]})
    assert says in warning
    assert bool(says) == bool(warning)


def test_totals_of_an_earlier_version_or_of_nothing_warn_of_nothing() -> None:
    assert giant({"rows_in": 5, "largest_component": 5}) == giant({}) == ""
    assert giant({"rows_in": 0, "largest_components": []}) == ""


def test_a_giant_component_is_held_against_the_samples_that_dedup_found() -> None:
    totals = {"largest_components": [{"size": 101, "methods": {"exact": 100}}]}
    assert giant({"rows_in": 100, "taken_down": 10_000, **totals}) == ""
    assert "101 of 202 samples (50%)" in giant({"rows_in": 100, "taken_down": 102, **totals})


def test_the_stage_writes_them(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr(run.log, "propagate", True)
    body = encoded(picture("noto-1f98a"))
    with session(LOCAL):
        corpus = write_corpus(tmp_path / "few", copies(), 3)
        totals = dedup(corpus, DedupConfig(), LOCAL)
        rows = [row_of(body, sha256=f"{number:064x}") for number in range(120)]
        assert "giant" not in caplog.text
        dedup(write_corpus(tmp_path / "all", rows, 100), DedupConfig(), LOCAL)
    assert "one component holds 120 of 120 samples (100%): a giant component" in caplog.text
    assert totals["component_sizes"] == {"5-8": 1}
    (largest,) = totals["largest_components"]
    kept = next(iter(removed(corpus).values()))["kept_key"]
    assert {*largest.pop("keys")} == {kept, *removed(corpus)}
    assert largest == {"component": 0, "size": 5, "methods": {"perceptual": 4}}
    assert sum(totals["distances"].values()) == 4
    assert Manifest.existing(Folder(corpus)).totals(DEDUP)["distances"] == totals["distances"]
