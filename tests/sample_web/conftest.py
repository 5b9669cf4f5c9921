"""One running sample web for all tests of this folder; its misbehaviours are ten times as quick."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pairmill.sample_web.process import SampleWeb, loopback_hosts


@pytest.fixture(scope="session")
def running_web() -> Iterator[SampleWeb]:
    with SampleWeb(loopback_hosts(), timescale=0.1) as web:
        yield web


@pytest.fixture
def web(running_web: SampleWeb) -> SampleWeb:
    running_web.reset()
    return running_web
