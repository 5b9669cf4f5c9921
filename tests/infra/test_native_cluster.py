"""The deployment without Docker: the command lines of docker-compose.yml, run as they stand on this machine.

Only places are swapped (ports, folders, host names): the Ray head and worker, the bucket, the sample web,
the submitted job, Prometheus and every health check are the words of the file. In MinIO's place stands
JuiceFS' S3 gateway, which is built from MinIO's. The job is the quickstart's corpus, with a part of its rows.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from infra.storage import Folder

ROOT = Path(__file__).resolve().parents[2]
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
DASHBOARD = ROOT / "infra/monitoring/grafana/dashboards/pairmill.json"
BIN = Path(sys.executable).parent
PROMETHEUS = shutil.which("prometheus")
ROWS = 1200
PATIENCE_S = 90.0
"""How long anything may take to come up before the test gives it up."""

pytestmark = pytest.mark.xdist_group("native_cluster")


def free_ports(count: int) -> list[str]:
    """Ports that nobody listens on; all differ."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [str(one.getsockname()[1]) for one in sockets]


@dataclass
class Machine:
    """This machine in the place of the Compose project: where each thing is here, and what runs."""

    folder: Path
    s3_url: str
    variables: Mapping[str, str]
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        names = ("gcs", "client", "dashboard", "web", "prometheus", "agent0", "agent1", "export0", "export1")
        ports = dict(zip((*names, "autoscaler_metrics", "dashboard_metrics"), free_ports(11), strict=True))
        self.ports = ports
        (self.folder / "home").mkdir()
        node = {
            "--min-worker-port=10002": "--min-worker-port=0",
            "--max-worker-port=19999": "--max-worker-port=0",
        }
        self.swaps: dict[str, dict[str, str]] = {
            "ray-head": node
            | {
                "--port=6379": f"--port={ports['gcs']}",
                "127.0.0.1:6379": f"127.0.0.1:{ports['gcs']}",
                "--ray-client-server-port=10001": f"--ray-client-server-port={ports['client']}",
                "--dashboard-host=0.0.0.0": "--dashboard-host=127.0.0.1",
                "--dashboard-port=8265": f"--dashboard-port={ports['dashboard']}",
                "--dashboard-agent-listen-port=52365": f"--dashboard-agent-listen-port={ports['agent0']}",
                "--metrics-export-port=8080": f"--metrics-export-port={ports['export0']}",
                "/tmp/ray": f"{self.folder}/h",
            },
            "ray-worker": node
            | {
                "ray-head:6379": f"127.0.0.1:{ports['gcs']}",
                "52365": ports["agent1"],
                "--metrics-export-port=8080": f"--metrics-export-port={ports['export1']}",
                "/tmp/ray": f"{self.folder}/w",
            },
            "minio-bucket": {},
            "web-a": {"web-a": "127.0.0.1", "8000": ports["web"]},
            "web-b": {"web-b": "127.0.0.2", "8000": ports["web"]},
            "quickstart": {
                "http://ray-head:8265": f"http://127.0.0.1:{ports['dashboard']}",
                "web-a:8000": f"127.0.0.1:{ports['web']}",
                "web-b:8000": f"127.0.0.2:{ports['web']}",
            },
            "prometheus": {
                "/etc/prometheus/": f"{self.folder}/",
                "=/prometheus": f"={self.folder}/tsdb",
                ":9090": f"127.0.0.1:{ports['prometheus']}",
            },
        }

    def words(self, service: str, key: str = "command") -> list[str]:
        """The words of a service's command, or of its health check, with their places swapped."""
        found = SERVICES[service]["command"] if key == "command" else SERVICES[service]["healthcheck"]["test"][1:]
        return [self._local(service, word) for word in found]

    def environment(self, service: str) -> dict[str, str]:
        """The environment of a service's container, laid over what this machine needs of its own."""
        own = {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "HOME": f"{self.folder}/home",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "AUTOSCALER_METRIC_PORT": self.ports["autoscaler_metrics"],
            "DASHBOARD_METRIC_PORT": self.ports["dashboard_metrics"],
            "RAY_metrics_report_interval_ms": "1000",
        }
        given = SERVICES[service].get("environment", {})
        return own | {name: self._local(service, str(value)) for name, value in given.items()}

    def start(self, service: str, command: Sequence[str] | None = None) -> subprocess.Popen[bytes]:
        """Start a service in a process group of its own; its output goes to `SERVICE.log`."""
        with (self.folder / f"{service}.log").open("ab") as log:
            process = subprocess.Popen(
                command or self.words(service),
                env=self.environment(service),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def wait_until_healthy(self, service: str, process: subprocess.Popen[bytes]) -> None:
        """Repeat the service's own health check until it passes; fails with the service's log."""
        check, environment = self.words(service, "healthcheck"), self.environment(service)
        given_up = time.monotonic() + PATIENCE_S
        while subprocess.run(check, env=environment, cwd=self.folder, capture_output=True).returncode != 0:
            if process.poll() is not None or time.monotonic() > given_up:
                pytest.fail(f"{service} is not healthy:\n{self.log(service)}")
            time.sleep(0.5)

    def log(self, service: str) -> str:
        """The end of what a service printed."""
        return (self.folder / f"{service}.log").read_text(errors="replace")[-4000:]

    def stop(self) -> None:
        """End every process that was started here, and all that they started."""
        mine = {child for process in self.started for child in family(process.pid)}
        for process in reversed(self.started):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        _, alive = psutil.wait_procs(mine, timeout=5)
        for process in self.started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for one in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(alive, timeout=8)

    def _local(self, service: str, word: str) -> str:
        word = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: self.variables.get(found[1], found[2]), word)
        word = word.replace("http://minio:9000", self.s3_url)
        for there, here in self.swaps[service].items():
            word = word.replace(there, here)
        return word


def family(pid: int) -> list[psutil.Process]:
    """A process and all its descendants, as far as they still are."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


@pytest.fixture(scope="module")
def short_folder() -> Iterator[Path]:
    """A folder with a short path: Ray's sockets below it must stay under 107 characters."""
    with tempfile.TemporaryDirectory(prefix="pm", dir="/tmp", ignore_cleanup_errors=True) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def variables(s3_gateway: Any) -> dict[str, str]:
    """What an operator would put in `.env`."""
    return {
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "MINIO_ROOT_USER": s3_gateway.env["AWS_ACCESS_KEY_ID"],
        "MINIO_ROOT_PASSWORD": s3_gateway.env["AWS_SECRET_ACCESS_KEY"],
        "WORKER_CPUS": "2",
    }


@pytest.fixture(scope="module")
def machine(short_folder: Path, s3_gateway: Any, variables: dict[str, str]) -> Iterator[Machine]:
    """Every service of the file but Prometheus, up and healthy, in the order that the file asks for."""
    here = Machine(short_folder, s3_gateway.env["AWS_ENDPOINT_URL"], variables)
    try:
        starting = {name: here.start(name) for name in ("ray-head", "web-a", "web-b", "minio-bucket")}
        for name in ("ray-head", "web-a", "web-b"):
            here.wait_until_healthy(name, starting[name])
        assert starting["minio-bucket"].wait(PATIENCE_S) == 0, here.log("minio-bucket")
        here.wait_until_healthy("ray-worker", here.start("ray-worker"))
        yield here
    finally:
        here.stop()


@pytest.fixture
def corpus(machine: Machine) -> Folder:
    """The quickstart's corpus folder, in the bucket that the stack made for itself."""
    (url,) = [word.split("=", 1)[1] for word in machine.words("quickstart") if word.startswith("--corpus=")]
    return Folder(url)


def submit(machine: Machine, entrypoint: Sequence[str]) -> list[str]:
    """The quickstart's command line with another entrypoint."""
    command = machine.words("quickstart")
    return [*command[: command.index("--") + 1], *entrypoint]


def test_places_to_swap_are_still_in_the_file(short_folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=short_folder) as name:
        swaps = Machine(Path(name), "", {}).swaps
    for service, places in swaps.items():
        described = json.dumps([SERVICES[service]["command"], SERVICES[service].get("healthcheck")])
        assert [place for place in places if place not in described] == [], service


def test_a_job_without_the_token_is_turned_away(machine: Machine) -> None:
    environment = machine.environment("quickstart") | {"RAY_AUTH_TOKEN": secrets.token_hex(16)}
    command = submit(machine, ["pairmill", "--help"])
    refused = subprocess.run(command, env=environment, cwd=machine.folder, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "auth" in (refused.stdout + refused.stderr).lower()


def test_the_submitted_command_is_there_and_its_exit_code_comes_back(machine: Machine) -> None:
    environment, folder = machine.environment("quickstart"), machine.folder
    ran = [
        subprocess.run(submit(machine, words), env=environment, cwd=folder, capture_output=True, text=True)
        for words in (["pairmill", "quickstart", "--help"], ["pairmill", "quickstart", "--no-such-option"])
    ]
    assert ran[0].returncode == 0, ran[0].stdout + ran[0].stderr
    assert "--corpus" in ran[0].stdout
    assert ran[1].returncode != 0


@pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is missing; install Debian's package prometheus")
@pytest.mark.slow
def test_every_panel_of_the_dashboard_shows_the_submitted_job(machine: Machine, corpus: Folder) -> None:
    write_prometheus_configuration(machine)
    assert PROMETHEUS is not None
    process = machine.start("prometheus", [PROMETHEUS, *machine.words("prometheus")])
    wait_until_ready(machine, process)
    begun = time.time()
    entrypoint = ["pairmill", "run", str(write_corpus_toml(machine, corpus)), "--cluster.address=auto"]
    job = machine.start("quickstart", submit(machine, entrypoint))
    assert job.wait(3 * PATIENCE_S) == 0, machine.log("quickstart")

    assert (corpus / "final").exists("index.parquet")
    api = f"http://127.0.0.1:{machine.ports['prometheus']}/api/v1"
    empty = [panel for panel, query in dashboard_queries() if not has_data(api, query, begun)]
    assert empty == []
    groups = ask(api, "/rules")["groups"]
    assert {rule["health"] for group in groups for rule in group["rules"]} <= {"ok", "unknown"}
    assert [rule for group in groups for rule in group["rules"]]
    targets = ask(api, "/targets")["activeTargets"]
    up = {target["labels"]["instance"].rsplit(":", 1)[1] for target in targets if target["health"] == "up"}
    assert {machine.ports["export0"], machine.ports["export1"]} <= up


def write_corpus_toml(machine: Machine, corpus: Folder) -> Path:
    """Write the quickstart's corpus with a part of its rows, in small shards; returns the TOML file."""
    from pairmill.sample_web.rows import write_rows

    webs = [word.split("=", 1)[1] for word in machine.words("quickstart") if word.startswith("--web=")]
    rows = machine.folder / "rows"
    write_rows(rows, webs)
    pq.write_table(pq.read_table(rows / "urls.parquet").slice(0, ROWS), rows / "part.parquet")
    text = (ROOT / "pairmill/quickstart.toml").read_text()
    for there, here in {
        'corpus = ""': f'corpus = "{corpus.url}"',
        "[plan]": f'[plan]\nurls = "{rows}/part.parquet"',
        "rows_per_shard = 500": f"rows_per_shard = {ROWS // 12}",
        "shards_at_once = 4": "shards_at_once = 1",
    }.items():
        assert there in text, there
        text = text.replace(there, here)
    toml = machine.folder / "corpus.toml"
    toml.write_text(text)
    return toml


def write_prometheus_configuration(machine: Machine) -> None:
    """Put the deployment's own files where the swapped command looks, only with shorter intervals."""
    monitoring = ROOT / "infra/monitoring"
    text = (monitoring / "prometheus.yml").read_text()
    for there, here in {
        "/etc/prometheus/": f"{machine.folder}/",
        "/tmp/ray/": f"{machine.folder}/h/",
        "scrape_interval: 10s": "scrape_interval: 1s",
        "refresh_interval: 10s": "refresh_interval: 1s",
        "evaluation_interval: 15s": "evaluation_interval: 1s",
    }.items():
        assert there in text, there
        text = text.replace(there, here)
    (machine.folder / "prometheus.yml").write_text(text)
    shutil.copy2(monitoring / "alerts.yml", machine.folder)


def wait_until_ready(machine: Machine, process: subprocess.Popen[bytes]) -> None:
    """Ask what the health check of the image asks with wget."""
    (url,) = [word for word in SERVICES["prometheus"]["healthcheck"]["test"] if word.startswith("http")]
    url = url.replace("127.0.0.1:9090", f"127.0.0.1:{machine.ports['prometheus']}")
    given_up = time.monotonic() + PATIENCE_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            assert process.poll() is None, machine.log("prometheus")
            assert time.monotonic() < given_up, machine.log("prometheus")
            time.sleep(0.2)


def dashboard_queries() -> list[tuple[str, str]]:
    """Every query of the provisioned dashboard and its panel's title, variables filled in as Grafana does."""
    dashboard = json.loads(DASHBOARD.read_text())
    variables = {name["name"]: name.get("allValue", "") for name in dashboard["templating"]["list"]}
    built_in = {"__rate_interval": "1m", "__range": "5m", "__interval": "10s"}
    found: list[tuple[str, str]] = []
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            query = re.sub(r"\$\{?(\w+)\}?", lambda name: (built_in | variables)[name[1]], target["expr"])
            found.append((panel["title"], query))
    assert len(found) >= 8
    return found


def has_data(api: str, query: str, begun: float) -> bool:
    """Whether the query's graph since `begun` (seconds since 1970) has at least one finite number."""
    window = {"query": query, "start": begun, "end": time.time(), "step": 1}
    result = ask(api, "/query_range?" + urllib.parse.urlencode(window))["result"]
    return any(math.isfinite(float(value)) for series in result for _, value in series["values"])


def ask(api: str, path: str) -> Any:
    """One question to Prometheus' HTTP interface; a query that it cannot parse is an error here."""
    with urllib.request.urlopen(api + path, timeout=30) as answer:
        return json.load(answer)["data"]
