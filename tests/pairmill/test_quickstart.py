"""The whole job with a short training: every row accounted for, nothing lost to a kill, chance without captions."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("quickstart")]

SHORT = Path(__file__).parent / "short_training.toml"


def command(out: Path, port: int) -> list[str]:
    options = ["--out", str(out), "--port", str(port), "--recipe", str(SHORT), "--json"]
    return [sys.executable, "-m", "pairmill.cli", "quickstart", *options]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def finish(out: Path, port: int) -> dict[str, Any]:
    done = subprocess.run(command(out, port), capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def digests(folder: Path, pattern: str) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob(pattern))}


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, port: int) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    finish(out, port)
    return out


def test_result_json_holds_what_was_measured(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert result["rows_in"] == pq.read_metadata(finished / "web" / "urls.parquet").num_rows
    assert sum(result["rows_by_status"].values()) == result["rows_in"]
    for suite, least in (("held_out_style", 1500), ("unseen_concepts", 100)):
        assert result[suite]["names"] >= least
        assert 0 <= result[suite]["top1"] <= result[suite]["top5"] <= 1
    assert result["retrieval"]
    for stage in ("plan", "ingest", "dedup", "repack", "verify", "train", "evaluate", "report"):
        assert result["seconds"][stage] > 0
    assert result["peak_memory_bytes"] < 6 * 2**30
    assert (finished / "report.html").stat().st_size > 100_000


def test_every_stage_accounts_for_every_row(finished: Path) -> None:
    stages = {stage["stage"]: stage for stage in json.loads((finished / "result.json").read_text())["stages"]}
    for name in ("plan", "ingest", "dedup", "repack"):
        assert sum(stages[name]["by_status"].values()) == stages[name]["rows_in"], name
    assert stages["plan"]["rows_out"] == stages["ingest"]["rows_in"]
    assert stages["ingest"]["by_status"]["success"] == stages["dedup"]["rows_in"] == stages["repack"]["rows_in"]
    assert stages["repack"]["by_status"]["success"] == stages["verify"]["samples"]


def test_every_row_ended_as_the_sample_web_means_it_to(finished: Path) -> None:
    expected = pq.read_table(finished / "web" / "expected.parquet").to_pylist()
    became: dict[str, list[tuple[str, str]]] = {}
    parts = [
        *(finished / "corpus" / "raw").glob("*.parquet"),
        *(finished / "corpus" / "plan").glob("rejected-*.parquet"),
    ]
    for path in parts:
        for row in pq.read_table(path).to_pylist():
            became.setdefault(row["url"], []).append((row.get("status") or "filtered", row["reason"]))
    wrong = Counter(
        (row["kind"], *became.get(row["url"], []))
        for row in expected
        if not any(
            row["expected_status"] in (None, status) and row["expected_reason"] in (None, reason)
            for status, reason in became.get(row["url"], [])
        )
    )
    assert not wrong


def test_a_second_run_does_nothing_again(finished: Path, port: int) -> None:
    final = finished / "corpus" / "final"
    before = {path.name: path.stat().st_mtime_ns for path in final.iterdir()}
    first = json.loads((finished / "result.json").read_text())
    second = finish(finished, port)
    assert {path.name: path.stat().st_mtime_ns for path in final.iterdir()} == before
    assert second["held_out_style"] == first["held_out_style"]


def test_no_temporary_file_is_left(finished: Path) -> None:
    assert not [path for path in finished.rglob("*") if path.name.startswith(".tmp-")]


def kill_when(process: subprocess.Popen[str], reached: Any, deadline_s: float = 300) -> None:
    """Kill -9 the process and all it started, as soon as `reached()` holds."""
    until = time.monotonic() + deadline_s
    while not reached():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < until
        time.sleep(0.05)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        try:
            os.kill(member.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
    psutil.wait_procs(family, timeout=20)


@pytest.mark.slow
def test_killed_in_every_stage_and_started_again_the_outcome_is_the_same(
    finished: Path, port: int, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    corpus = out / "corpus"
    moments = (
        lambda: len(list((corpus / "raw").glob("*_stats.json"))) >= 2,
        lambda: (corpus / "dedup").exists(),
        lambda: len(list((corpus / "final").glob("*.tar"))) >= 1,
        lambda: (out / "run" / "checkpoints").exists() and any((out / "run" / "checkpoints").iterdir()),
    )
    for reached in moments:
        with subprocess.Popen(
            command(out, port), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True
        ) as process:
            kill_when(process, reached)
    result = finish(out, port)
    for folder, pattern in (
        ("raw", "*.tar"),
        ("final", "*.tar"),
        ("dedup", "removed.parquet"),
        ("plan", "*.parquet"),
    ):
        ours, theirs = digests(corpus / folder, pattern), digests(finished / "corpus" / folder, pattern)
        assert ours == theirs, folder
    first = json.loads((finished / "result.json").read_text())
    assert result["rows_by_status"] == first["rows_by_status"]
    assert result["training"]["samples"] == first["training"]["samples"]


@pytest.mark.slow
def test_captions_shuffled_end_at_chance(finished: Path, tmp_path: Path) -> None:
    """The control: the same training on the same pictures with captions dealt out anew learns nothing that holds."""
    recipe = tmp_path / "control.toml"
    text = SHORT.read_text().replace(
        "[data]", f'[data]\nfolder = "{finished / "corpus" / "final"}"\nshuffle_captions = true'
    )
    recipe.write_text(text)
    run = tmp_path / "control"
    pairmill = [sys.executable, "-m", "pairmill.cli"]
    subprocess.run([*pairmill, "train", str(recipe), "--run", str(run), "--nproc", "2"], check=True, timeout=600)
    suite = finished / "suites" / "unseen_concepts"
    done = subprocess.run(
        [*pairmill, "eval", str(run), "--suite", str(suite), "--json"],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    control = json.loads(done.stdout)[0]
    real = json.loads((finished / "result.json").read_text())["unseen_concepts"]
    # 400 pictures of 100 names: chance is 1%, and 3% is four standard deviations above it.
    assert control["top1"] < 0.03
    assert real["top1"] > 0.03
