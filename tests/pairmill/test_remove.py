"""`pairmill remove` as a user meets it, on a finished corpus."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq

Pairmill = Callable[..., subprocess.CompletedProcess[str]]


def test_the_command_and_every_command_after_it(finished: Path, pairmill: Pairmill, tmp_path: Path) -> None:
    rows = pq.read_table(finished / "final" / "00000.parquet").to_pylist()
    listed = tmp_path / "gone.txt"
    listed.write_text(f"key {rows[3]['source_key']}\nhost nowhere.example # gone\nkee 5\n")
    wrong = pairmill("remove", finished, "--list", listed)
    assert wrong.returncode == 2
    assert "1 malformed lines, nothing was done: line 3: 'kee' is no kind of entry" in wrong.stderr

    listed.write_text(f"key {rows[3]['source_key']}\nhost nowhere.example # gone\n")
    dry = pairmill("remove", finished, "--list", listed, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert f"final 00000 000000003: key {rows[3]['source_key']}" in dry.stdout
    assert "names no sample host nowhere.example" in dry.stdout
    assert not (finished / "tombstones").exists()

    done = pairmill("remove", finished, "--list", listed, "--reason", "a letter", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["samples"] >= 1, result["shards"]["final"]) == (True, 1)
    assert json.loads((finished / result["tombstone"]).read_text().splitlines()[0])["reason"] == "a letter"
    for folder in ("raw", "final"):
        checked = pairmill("verify", finished / folder)
        assert checked.returncode == 0, checked.stdout
        assert "of them taken down" in checked.stdout

    again = pairmill("run", finished.parent / "corpus.toml")
    assert again.returncode == 0, again.stderr
    assert "taken_down" in again.stdout
    report = pairmill("report", finished, "--out", tmp_path / "report.html")
    assert report.returncode == 0, report.stderr
    assert "taken down" in (tmp_path / "report.html").read_text()
    state = json.loads(pairmill("status", finished, "--json").stdout)
    assert sum(state["by_status"].values()) == state["rows"]
