"""docker-compose.yml: valid, closed to the outside, and each of its command lines is one that exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "docker-compose.yml"
LONG_RUNNING = ("ray-head", "ray-worker", "minio", "prometheus", "grafana", "web-a", "web-b")
ONE_SHOT = ("minio-bucket", "quickstart")


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(COMPOSE.read_text())["services"]


def test_the_file_fits_the_compose_schema() -> None:
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.compose-spec",
        str(COMPOSE),
    ]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_service_is_known_here(services: dict[str, dict[str, Any]]) -> None:
    assert sorted(services) == sorted(LONG_RUNNING + ONE_SHOT)


def test_ports_are_open_to_this_machine_alone(services: dict[str, dict[str, Any]]) -> None:
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert published
    assert [port for port in published if not port.startswith("127.0.0.1:")] == []


def test_every_service_has_limits_and_may_gain_no_privileges(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        limits = service["deploy"]["resources"]["limits"]
        assert limits.keys() == {"cpus", "memory"}, name
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_what_keeps_running_has_a_health_check_and_others_wait_for_it(
    services: dict[str, dict[str, Any]],
) -> None:
    for name in LONG_RUNNING:
        assert services[name]["healthcheck"]["test"][0] == "CMD", name
    for name, service in services.items():
        for needed, how in service.get("depends_on", {}).items():
            wanted = "service_completed_successfully" if needed in ONE_SHOT else "service_healthy"
            assert how["condition"] == wanted, f"{name} waits for {needed}"


def test_images_are_pinned(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        image = service["image"]
        if "build" not in service:
            assert re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*", image), f"{name}: {image}"
            assert not image.endswith("latest")


def test_secrets_come_from_the_environment(services: dict[str, dict[str, Any]]) -> None:
    secret = re.compile(r"TOKEN|SECRET|PASSWORD|ACCESS_KEY")
    for name, service in services.items():
        for variable, value in service.get("environment", {}).items():
            if secret.search(variable):
                assert re.fullmatch(r"\$\{\w+:-pairmill[\w-]*\}", value), f"{name}: {variable}"


def test_volumes_named_are_declared_and_files_mounted_exist(services: dict[str, dict[str, Any]]) -> None:
    declared = yaml.safe_load(COMPOSE.read_text())["volumes"]
    for service in services.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (ROOT / source).exists() if source.startswith("./") else source in declared, volume


def test_prometheus_finds_its_rules_and_the_list_of_nodes_where_they_are_mounted(
    services: dict[str, dict[str, Any]],
) -> None:
    settings = yaml.safe_load((ROOT / "infra/monitoring/prometheus.yml").read_text())
    mounts = {volume.split(":")[0]: volume.split(":")[1] for volume in services["prometheus"]["volumes"]}
    assert settings["rule_files"] == [mounts["./infra/monitoring/alerts.yml"]]
    (discovery,) = settings["scrape_configs"][0]["file_sd_configs"]
    assert discovery["files"] == [f"{mounts['ray-session']}/prom_metrics_service_discovery.json"]
    assert f"--temp-dir={mounts['ray-session']}" in services["ray-head"]["command"]
    assert f"--config.file={mounts['./infra/monitoring/prometheus.yml']}" in services["prometheus"]["command"]


def test_grafana_is_given_its_dashboards_where_its_provider_looks(
    services: dict[str, dict[str, Any]],
) -> None:
    grafana = ROOT / "infra/monitoring/grafana"
    provider = yaml.safe_load((grafana / "provisioning/dashboards/pairmill.yml").read_text())["providers"][0]
    source = yaml.safe_load((grafana / "provisioning/datasources/prometheus.yml").read_text())["datasources"][0]
    mounts = {volume.split(":")[0]: volume.split(":")[1] for volume in services["grafana"]["volumes"]}
    folder = mounts["./infra/monitoring/grafana/dashboards"]
    assert provider["options"]["path"] == folder
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{folder}/pairmill.json"
    assert (grafana / "dashboards/pairmill.json").exists()
    assert source["url"] == "http://prometheus:9090"
    assert services["grafana"]["environment"]["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"


def test_the_quickstart_is_a_command_line_that_pairmill_understands(
    services: dict[str, dict[str, Any]],
) -> None:
    from pairmill.cli import app

    command = services["quickstart"]["command"]
    entrypoint = command[command.index("--") + 1 :]
    assert entrypoint[0] == "pairmill"
    _, bound, *_ = app.parse_args(entrypoint[1:], exit_on_error=False, print_error=False)
    given = bound.arguments
    assert given["corpus"] == "s3://pairmill/quickstart"
    assert given["web"] == ["http://web-a:8000", "http://web-b:8000"]
    assert given["cluster"].address == "auto"
    assert str(given["out"]).startswith("/work/")
    assert "work:/work" in services["ray-head"]["volumes"]
