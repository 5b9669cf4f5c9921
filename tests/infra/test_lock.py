"""One process at a time on a folder, on a local disk and on a real S3 server."""

from __future__ import annotations

import errno
import json
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from infra.errors import UserError
from infra.lease import LEASE_S
from infra.lock import LOCK_NAME, exclusive
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


def test_a_lease_of_another_host_holds(s3_url: str) -> None:
    folder = Folder(s3_url)
    lease = {"host": "elsewhere", "pid": 1, "renewed": time.time()}
    folder.write(LOCK_NAME, json.dumps(lease).encode())
    with pytest.raises(UserError, match="process 1 on elsewhere"), exclusive(folder):
        pytest.fail("both hold it")


@pytest.mark.parametrize("age_s", [LEASE_S + 1, -1e6])
def test_a_lease_that_ran_out_or_was_dated_ahead_is_free_unless_it_is_renewed(
    s3_url: str, monkeypatch: pytest.MonkeyPatch, age_s: float
) -> None:
    """Whose clock is wrong nobody can say; who lives renews."""
    monkeypatch.setattr("infra.lease.LEASE_S", 4.0)
    folder = Folder(s3_url)
    lease = {"host": "elsewhere", "pid": 1, "renewed": time.time() - age_s}
    renewal = threading.Timer(0.5, folder.write_json, (LOCK_NAME, lease | {"renewed": lease["renewed"] + 1}))
    folder.write_json(LOCK_NAME, lease)
    renewal.start()
    with pytest.raises(UserError, match="process 1 on elsewhere"), exclusive(folder):
        pytest.fail("both hold it")
    renewal.join()
    with exclusive(folder):
        assert folder.read_json(LOCK_NAME)["host"] != "elsewhere"
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


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe", b"[]", b"{", b'{"renewed": "yesterday"}', b'{"renewed": null}'],
)
def test_what_is_no_lease_holds_nothing(s3_url: str, content: bytes) -> None:
    folder = Folder(s3_url)
    folder.write(LOCK_NAME, content)
    with exclusive(folder):
        assert b"token" in folder.read(LOCK_NAME)
    assert not folder.exists(LOCK_NAME)


def test_a_number_of_another_container_is_not_looked_up_here(s3_url: str) -> None:
    """Its host may bear our name, and have no such process here."""
    folder = Folder(s3_url)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    lease = {"host": platform.node(), "pid": gone.pid, "machine": "another", "renewed": time.time()}
    folder.write(LOCK_NAME, json.dumps(lease).encode())
    with pytest.raises(UserError, match=f"process {gone.pid} on "), exclusive(folder):
        pytest.fail("both hold it")


def test_of_those_that_start_at_once_one_holds_it(s3_url: str) -> None:
    pipe = subprocess.PIPE
    starts = "import sys\nimport infra.lock\nprint('here', flush=True)\nsys.stdin.readline()\n" + HOLDER
    command = [sys.executable, "-c", starts, s3_url]
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=ROOT) for _ in range(3)]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "here\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        assert sorted(process.stdout.readline() for process in processes if process.stdout) == ["", "", "held\n"]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_who_lost_the_lease_is_stopped_and_leaves_the_next_ones(s3_url: str) -> None:
    folder = Folder(s3_url)
    pipe = subprocess.PIPE
    hasty = "import infra.lease\ninfra.lease.LEASE_S = 0.4\n" + HOLDER
    process = subprocess.Popen(
        [sys.executable, "-c", hasty, s3_url], stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=ROOT
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        lease = {"host": "elsewhere", "pid": 1, "token": "theirs", "renewed": time.time()}
        folder.write(LOCK_NAME, json.dumps(lease).encode())
        assert process.wait(timeout=60) == -signal.SIGTERM
        assert process.stderr is not None
        assert "process 1 on elsewhere has taken this folder" in process.stderr.read()
    finally:
        process.kill()
        process.communicate()
    assert folder.read_json(LOCK_NAME)["host"] == "elsewhere"
    folder.delete(LOCK_NAME)


def test_a_folder_in_the_locks_place_is_named(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).mkdir()
    with pytest.raises(UserError, match=r"\.lock: is a folder"), exclusive(Folder(tmp_path)):
        pytest.fail("it cannot be held")
