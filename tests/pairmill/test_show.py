"""What a person sees of test sets on a terminal of 80 columns."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pairmill import show

FOLDERS = "/a/folder/with/quite/a/long/path/of/some/experiment"
COUNTS = {
    "pictures": 31_783, "broken": 31_773, "unhashed": 4_321, "with_copy": 5, "samples": 1_234_567,
    "samples_by_hash": 1_200_000, "samples_by_embedding": 34_567, "with_copy_left": 4, "samples_left": 23_456,
}  # fmt: skip


def test_suites_are_told_apart_and_nothing_is_cut(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(show, "console", Console(width=80))
    suites = (f"{FOLDERS}/one/test", f"{FOLDERS}/two/test", f"{FOLDERS}/flickr30k")
    sets: list[dict[str, Any]] = [{"suite": suite} | COUNTS for suite in suites]
    show.overlap({"corpus": "corpus", "samples": 2_000_000, "left": 5, "test_sets": sets})
    told = capsys.readouterr().out
    for word in ("one/test", "two/test", " flickr30k ", "31,783", "4,321", "50.00%", "1,234,567", "34,567", "23,456"):
        assert word in told
    assert FOLDERS not in told
    assert "…" not in told


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map("/".join), min_size=1, unique=True))
def test_endings_are_ends_that_differ(paths: list[str]) -> None:
    found = show.endings(paths)
    assert len(set(found)) == len(paths)
    for path, end in zip(paths, found, strict=True):
        assert f"/{path}".endswith(f"/{end}")
        shorter = end.partition("/")[2]
        others = [f"/{other}" for other in paths if other != path]
        assert not shorter or any(other.endswith(f"/{shorter}") for other in others)
