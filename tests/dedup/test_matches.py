"""Of each suite and sample the closest picture, whatever its number and however the matches came."""

from __future__ import annotations

import numpy as np
import pytest

from dedup import matches
from dedup.matches import MatchKeeper
from dedup.suites import SHA256_BYTES, Suites
from shards.suite import SuitePicture

OF_SUITE = np.asarray([0, 0, 1, 1], np.int32)
"""Pictures 0 and 1 are of the first suite, 2 and 3 of the second."""


def suites() -> Suites:
    count = len(OF_SUITE)
    return Suites(
        ("one", "two"), OF_SUITE, tuple(SuitePicture(str(number), "file") for number in range(count)),
        np.zeros(count, f"S{SHA256_BYTES}"), np.zeros((count, 4), np.uint64), np.zeros(count, np.int16),
        np.zeros(count, bool),
    )  # fmt: skip


@pytest.mark.parametrize("held", [1, 1000])
def test_the_closest_is_not_the_one_of_the_lowest_number(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matches, "_FEWEST_HELD", held)
    keeper = MatchKeeper(suites())
    for picture, sample, gap in ((0, 8, 7), (2, 8, 5), (3, 8, 2), (1, 8, 3), (3, 4, 9), (2, 4, 9), (1, 4, 30)):
        keeper.add(np.asarray([picture]), np.asarray([sample]), np.asarray([gap]))
    found = keeper.matches()
    rows = list(
        zip(*(column.tolist() for column in (found.sample, found.suite, found.picture, found.gap)), strict=True)
    )
    assert rows == [(4, 0, 1, 30), (4, 1, 2, 9), (8, 0, 1, 3), (8, 1, 3, 2)]
    closest = found.closest()
    assert (closest.sample.tolist(), closest.picture.tolist(), closest.gap.tolist()) == ([4, 8], [2, 3], [9, 2])
