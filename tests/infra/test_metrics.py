"""What is counted cannot fail the work that is counted."""

from __future__ import annotations

import pytest

from infra import metrics


def test_a_label_is_ascii_whatever_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_labelled_hosts", set())
    for host in ("bücher.example", "caf\udce9.example", "a.example"):
        assert metrics.host_label(host).isascii()
        assert metrics.host_label(host) == metrics.host_label(host)
    assert metrics.host_label("a.example") == "a.example"


def test_nothing_may_be_counted() -> None:
    metrics.host_paused_seconds().inc(0.0, tags={"host": "a.example", "reason": "rest"})
