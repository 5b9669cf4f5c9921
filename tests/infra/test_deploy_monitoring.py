"""Prometheus' files and the dashboard, without a cluster: syntax, alerts played through, metric names."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra import metrics

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "infra/monitoring"
DASHBOARD = MONITORING / "grafana/dashboards/pairmill.json"
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="promtool is missing; it comes with Debian's package prometheus"
)
EXPORTED = (
    metrics.rows, metrics.shards, metrics.fetched_bytes, metrics.host_failures, metrics.step_seconds,
    metrics.shard_seconds, metrics.in_flight, metrics.worker_memory_bytes,
)  # fmt: skip


def exported_names() -> set[str]:
    """Every Pairmill metric under the name that Prometheus knows it by."""
    names: set[str] = set()
    for declare in EXPORTED:
        info = declare().info
        suffixes = ("_bucket", "_sum", "_count") if info["name"].endswith("_seconds") else ("",)
        names |= {f"ray_{info['name']}{suffix}" for suffix in suffixes}
    return names


def panels() -> list[dict[str, Any]]:
    """The dashboard's panels that ask something."""
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def promtool(*arguments: str | Path, cwd: Path = ROOT) -> None:
    """Run promtool; a complaint of its is the test's failure."""
    assert PROMTOOL is not None
    checked = subprocess.run([PROMTOOL, *arguments], cwd=cwd, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@needs_promtool
def test_the_prometheus_configuration_is_valid(tmp_path: Path) -> None:
    settings = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    settings["rule_files"] = [str(MONITORING / "alerts.yml")]
    nodes = tmp_path / "nodes.json"  # where Ray writes which, there is a file only while a cluster runs
    nodes.write_text("[]")
    settings["scrape_configs"][0]["file_sd_configs"][0]["files"] = [str(nodes)]
    local = tmp_path / "prometheus.yml"
    local.write_text(yaml.safe_dump(settings))
    promtool("check", "config", local)


@needs_promtool
def test_alerts_fire_when_they_should_and_only_then() -> None:
    promtool("test", "rules", "alerts.test.yml", cwd=Path(__file__).parent)


def test_every_alert_is_played_through() -> None:
    rules = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]
    played = yaml.safe_load((Path(__file__).parent / "alerts.test.yml").read_text())["tests"]
    fired = {case["alertname"] for test in played for case in test["alert_rule_test"] if case.get("exp_alerts")}
    assert fired == {rule["alert"] for rule in rules}


@pytest.mark.parametrize("path", [DASHBOARD, MONITORING / "alerts.yml"], ids=lambda path: path.name)
def test_only_metrics_that_are_exported_are_asked_for(path: Path) -> None:
    asked = set(re.findall(r"ray_pairmill_\w+", path.read_text()))
    assert asked
    assert asked - exported_names() == set()


def test_every_metric_is_on_the_dashboard() -> None:
    asked = re.findall(r"ray_(pairmill_\w+)", DASHBOARD.read_text())
    missing = [
        declare().info["name"]
        for declare in EXPORTED
        if not any(name.startswith(declare().info["name"]) for name in asked)
    ]
    assert missing == []


def test_every_metric_is_explained_to_operations() -> None:
    manual = (ROOT / "docs/operations.md").read_text()
    for declare in EXPORTED:
        assert f"`ray_{declare().info['name']}" in manual, declare().info["name"]
    for rule in yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]:
        assert rule["alert"] in manual


def test_panels_have_a_title_an_explanation_and_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        assert panel["title"]
        assert panel["description"].endswith(".")
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    ids = [panel["id"] for panel in json.loads(DASHBOARD.read_text())["panels"]]
    assert len(set(ids)) == len(ids)
