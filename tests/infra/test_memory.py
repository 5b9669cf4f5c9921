"""Memory: what the C library holds free goes back to the system."""

from __future__ import annotations

import sys

import psutil
import pytest

from infra.memory import give_back

OBJECTS, OBJECT_BYTES, KEPT_EVERY = 40_000, 2000, 50


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc is asked")
def test_holes_are_given_back() -> None:
    """Objects in between that live on keep the C library from shrinking its heap by itself."""
    objects = [bytes(OBJECT_BYTES) for _ in range(OBJECTS)]
    kept = objects[::KEPT_EVERY]
    del objects
    before = psutil.Process().memory_info().rss
    give_back()
    assert before - psutil.Process().memory_info().rss > OBJECTS * OBJECT_BYTES // 2
    assert len(kept) == OBJECTS // KEPT_EVERY
