"""One process at a time on a folder, on a local disk and on a real S3 server."""

from __future__ import annotations

import errno
import json
import platform
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
WITHOUT_LOCKS = """
import ctypes, struct, sys
# A kernel filter (seccomp) that lets `flock` (73 on x86-64, 32 on arm64) end with an error, as a mount without locks.
number, error = map(int, sys.argv[2:])
code = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x50000 | error), (0x06, 0, 0, 0x7FFF0000)]
program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in code))
class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Filter(len(code), ctypes.addressof(program)))) == 0
"""
FLOCK = {"x86_64": 73, "aarch64": 32}


def without_locks(url: str, error: int) -> subprocess.Popen[str]:
    """Start a holder for whom the file system has no locks."""
    command = [sys.executable, "-c", WITHOUT_LOCKS + HOLDER, url, str(FLOCK[platform.machine()]), str(error)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)


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


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_where_a_file_system_has_no_locks_a_lease_holds(tmp_path: Path, error: int) -> None:
    """The second process says who holds it; the folder is free once the first has ended, and once it is killed."""
    for end in (signal.SIGCONT, signal.SIGKILL):
        first = without_locks(str(tmp_path), error)
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == "held\n"
            second = without_locks(str(tmp_path), error)
            try:
                _, words = second.communicate("")
            finally:
                second.kill()
                second.wait()
            assert f"process {first.pid} on " in words.splitlines()[-1]
            assert "already working on this folder" in words.splitlines()[-1]
            first.send_signal(end)
            first.communicate("")
        finally:
            first.kill()
            first.wait()
    with exclusive(Folder(tmp_path)):
        pass


def test_a_lock_that_fails_otherwise_is_named(tmp_path: Path) -> None:
    """An error of the disk's: one line, with the file."""
    process = without_locks(str(tmp_path), errno.EIO)
    _, words = process.communicate("")
    assert words.splitlines()[-1] == f"infra.errors.RunError: {tmp_path}/.lock: cannot be locked (Input/output error)"
