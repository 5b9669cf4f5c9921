"""What tests of every floor use: a real S3 server."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PATIENCE_S = 60.0
"""How long the server may take to answer for the first time."""
MAX_ID_CHARACTERS = 60


def pytest_make_parametrize_id(val: object) -> str | None:
    """Shorten what long texts and bytes add to a test's name: the name goes into every child's environment."""
    if isinstance(val, str | bytes) and len(val) > MAX_ID_CHARACTERS:
        return f"{str(val[:20])!a}-of-{len(val)}"
    return None


@pytest.fixture(autouse=True)
def _pairmill_log_is_heard() -> None:
    """Undo what a command run in this process did to the log, so that `caplog` hears it, and once."""
    log = logging.getLogger("pairmill")
    log.handlers.clear()
    log.propagate = True


@dataclass
class S3Gateway:
    """A running S3 server (JuiceFS' gateway, built from MinIO's); `env` is what a client needs."""

    folder: Path
    port: int = 0
    bucket: str = "pairs"
    env: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def url(self, name: str) -> str:
        """Return the URL of a folder in the bucket."""
        return f"s3://{self.bucket}/{name}"

    def start(self) -> None:
        """Start the server on `port` (a free one at first) and wait until it answers; its data are kept."""
        juicefs, meta = str(Path(sys.executable).parent / "juicefs"), f"sqlite3://{self.folder}/meta.db"
        log = (self.folder / "gateway.log").open("ab")
        if not self.port:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port = probe.getsockname()[1]
            self.env = {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}", "AWS_ACCESS_KEY_ID": "pairmill",
                "AWS_SECRET_ACCESS_KEY": secrets.token_hex(16), "AWS_DEFAULT_REGION": "us-east-1",
            }  # fmt: skip
            made = [juicefs, "format", meta, "pairs", "--bucket", f"{self.folder}/data", "--trash-days", "0"]
            subprocess.run(made, check=True, stdout=log, stderr=log)
        root = {
            "MINIO_ROOT_USER": "pairmill",
            "MINIO_ROOT_PASSWORD": self.env["AWS_SECRET_ACCESS_KEY"],
        }
        serve = [
            juicefs, "gateway", meta, f"127.0.0.1:{self.port}", "--multi-buckets", "--no-usage-report",
            "--metrics", "127.0.0.1:0", "--cache-dir", "memory", "--log", f"{self.folder}/gateway.out",
        ]  # fmt: skip
        self.process = subprocess.Popen(serve, env=os.environ | root, stdout=log, stderr=log, start_new_session=True)
        log.close()
        self._wait()

    def stop(self) -> None:
        """End the server at once, as a crash would."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def _wait(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert self.process is not None
            gone = self.process.poll() is not None
            if gone or time.monotonic() > deadline:
                pytest.fail((self.folder / "gateway.log").read_text()[-2000:])
            time.sleep(0.1)


@pytest.fixture(scope="session")
def s3_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Gateway]:
    """A real S3 server for the tests of this process; the environment points every client to it."""
    import s3fs

    gateway = S3Gateway(tmp_path_factory.mktemp("s3"))
    with pytest.MonkeyPatch.context() as patch:
        try:
            gateway.start()
            for name, value in gateway.env.items():
                patch.setenv(name, value)
            s3fs.S3FileSystem.clear_instance_cache()
            _make_bucket(gateway)
            yield gateway
        finally:
            gateway.stop()
            s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def s3_url(s3_gateway: S3Gateway) -> str:
    """The URL of a new folder on a real S3 server."""
    return s3_gateway.url(secrets.token_hex(6))


def _make_bucket(gateway: S3Gateway) -> None:
    """Make the bucket, waiting until the server is ready to."""
    import s3fs

    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            s3fs.S3FileSystem().mkdir(gateway.bucket)
            return
        except (OSError, ValueError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
