"""Runs the sample web in a process of its own, for as long as it is needed and not longer."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pairmill.sample_web import archive, misbehaviour

ROOT = Path(__file__).parents[2]
STOP_TIMEOUT_S = 5.0


class SampleWebError(Exception):
    """The server did not start; the message is its own one line."""


def loopback_hosts(count: int = 4) -> tuple[str, ...]:
    """Up to `count` loopback addresses that can be listened on here: all of 127/8 on Linux, one elsewhere."""
    return tuple(host for host in (f"127.0.0.{number}" for number in range(1, count + 1)) if _can_bind(host))


class SampleWeb:
    """A running sample web: a context manager that starts the server process and always stops it.

    The process also ends by itself when this one is gone, however that came. `base_urls` has one URL a host,
    without a slash at its end.
    """

    def __init__(self, hosts: Sequence[str] = ("127.0.0.1",), port: int = 0, timescale: float = 1.0) -> None:
        self.hosts = tuple(hosts)
        self.port = port
        self.timescale = timescale
        self.base_urls: tuple[str, ...] = ()
        self._process: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int | None:
        """The server's process id while it runs."""
        return self._process.pid if self._process else None

    def start(self) -> Self:
        """Starts the server and waits until it listens. Raises SampleWebError with the server's message."""
        command = [sys.executable, "-m", "pairmill.sample_web.serve", "--hosts", ",".join(self.hosts)]
        command += ["--port", str(self.port), "--misbehave-timescale", str(self.timescale)]
        command += ["--parent", str(os.getpid())]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with tempfile.TemporaryFile("w+") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "PYTHONPATH": path},
                # A Ctrl-C in the terminal is for the pipeline, which stops the server when it is done.
                start_new_session=True,
            )
            assert self._process.stdout is not None
            line = self._process.stdout.readline()
            if not line:
                code = self._process.wait()
                self._process.stdout.close()
                self._process = None
                errors.seek(0)
                raise SampleWebError(errors.read().strip() or f"sample web: ended with exit code {code}")
        self.base_urls = tuple(json.loads(line)["base_urls"])
        return self

    def stop(self) -> None:
        """Ends the server process; does nothing if it has ended."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()

    def url(self, kind: str, key: str | None = None, host: int = 0) -> str:
        """The URL at which the server acts `kind` out on a picture, by default training's first.

        Raises KeyError for a kind that the catalogue does not have.
        """
        chosen = key or archive.select("train")[0].key
        return misbehaviour.url(kind, chosen, self.base_urls[host])

    def log(self) -> dict[str, Any]:
        """What was asked of the server since it started or was last reset; see `Ledger.as_json`."""
        return self._control("GET", "log")

    def reset(self) -> None:
        """Forgets counts and who came before, ends a pause, and answers for robots.txt as at the start."""
        self._control("POST", "reset")

    def pause(self, seconds: float) -> None:
        """Resets every connection for the next `seconds` seconds, as a site does that is down."""
        self._control("POST", f"pause?seconds={seconds}")

    def set_robots_status(self, status: int) -> None:
        """Answers for robots.txt with this HTTP status from now on."""
        self._control("POST", f"robots?status={status}")

    def _control(self, method: str, action: str) -> dict[str, Any]:
        request = urllib.request.Request(f"{self.base_urls[0]}/control/{action}", method=method)
        # A proxy in the environment is for the web outside.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=30) as answer:
            body: dict[str, Any] = json.load(answer)
        return body

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def free_port() -> int:
    """Return a port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _can_bind(host: str) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
    return True
