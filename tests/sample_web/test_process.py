from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from pairmill.sample_web.process import ROOT, SampleWeb, SampleWebError


def is_running(pid: int) -> bool:
    try:
        # A process that has ended and that nobody has waited for is not running.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pid: int, timeout_s: float = 10) -> bool:
    deadline = time.monotonic() + timeout_s
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(pid)


def test_stops_with_the_context_even_while_an_answer_hangs() -> None:
    with SampleWeb() as web:
        pid = web.pid
        assert pid
        assert is_running(pid)
        with pytest.raises(TimeoutError):
            urllib.request.urlopen(web.url("hang"), timeout=0.2)
    assert not is_running(pid)
    web.stop()


def test_port_that_is_taken_is_one_line_and_exit_code_2() -> None:
    with SampleWeb() as web:
        port = web.base_urls[0].rpartition(":")[2]
        command = [sys.executable, "-m", "pairmill.sample_web.serve", "--port", port]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 2
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1
        assert f"127.0.0.1:{port}" in done.stderr
        with pytest.raises(SampleWebError, match=f"cannot listen on 127.0.0.1:{port}"):
            SampleWeb(port=int(port)).start()


def test_ends_by_itself_when_its_parent_is_killed() -> None:
    script = (
        "import time; from pairmill.sample_web.process import SampleWeb\n"
        "web = SampleWeb().start(); print(web.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    with parent.stdout:
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    assert wait_until_gone(pid)
