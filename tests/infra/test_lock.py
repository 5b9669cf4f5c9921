"""One process at a time on a folder, on a local disk and on a real S3 server."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra.errors import UserError
from infra.lock import LEASE_S, LOCK_NAME, exclusive
from infra.storage import Folder

ROOT = Path(__file__).parents[2]
HOLDER = (
    "import sys\nfrom infra.lock import exclusive\nfrom infra.storage import Folder\n"
    "with exclusive(Folder(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
)


def holder(url: str) -> subprocess.Popen[str]:
    """Start a process that holds the lock until its standard input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture(params=["file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "corpus") if request.param == "file" else request.getfixturevalue("s3_url")


def test_the_second_process_says_who_holds_it_and_leaves(url: str) -> None:
    process = holder(url)
    try:
        with (
            pytest.raises(UserError, match=f"process {process.pid} on .* already working"),
            exclusive(Folder(url)),
        ):
            pytest.fail("both hold it")
    finally:
        process.communicate("")
    with exclusive(Folder(url)):
        pass


def test_a_killed_holder_lets_go(url: str) -> None:
    process = holder(url)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with exclusive(Folder(url)):
        pass


def test_a_lease_of_another_host_holds_until_it_runs_out(s3_url: str) -> None:
    folder = Folder(s3_url)
    lease = {"host": "elsewhere", "pid": 1, "renewed": time.time()}
    folder.write(LOCK_NAME, json.dumps(lease).encode())
    with pytest.raises(UserError, match="process 1 on elsewhere"), exclusive(folder):
        pytest.fail("both hold it")
    folder.write(LOCK_NAME, json.dumps(lease | {"renewed": time.time() - LEASE_S - 1}).encode())
    with exclusive(folder):
        assert "elsewhere" not in folder.read(LOCK_NAME).decode()
    assert not folder.exists(LOCK_NAME)
