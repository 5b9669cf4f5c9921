"""The worker's side of its decoder processes: a body in, facts and a picture out, whatever becomes of the process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import select
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any

from infra import metrics
from infra.errors import RunError
from ingest.config import IngestConfig
from ingest.decoder import receive, send
from shards.layout import Reason, Status

STARTS_IN_S = 60.0
STARTS = 3
"""Tries to start a decoder: the system may kill one that has only begun."""
_PIPE_BYTES = 2**20
_SET_PIPE_SIZE = getattr(fcntl, "F_SETPIPE_SZ", None)


class Decoders:
    """`config.decoders` processes that decode, each started when it is first needed.

    A body that ends its process is tried once more in a new one, since the system may have ended the first for
    reasons of its own; a second time, the row is lost (`decoder_crash`), and that row alone.
    """

    def __init__(self, config: IngestConfig) -> None:
        self._config = config
        self._threads = ThreadPoolExecutor(config.decoders, "decode")
        self._idle: queue.SimpleQueue[_Decoder] = queue.SimpleQueue()
        for _ in range(config.decoders):
            self._idle.put(_Decoder(config))

    def submit(self, body: bytes, boxes: Any = None) -> Future[tuple[dict[str, Any], bytes | None]]:
        """Return the future of a body's facts, for its sidecar row, and its picture or None.

        It raises RunError if decoders do not start here at all.
        """
        return self._threads.submit(self._decode, body, boxes)

    def close(self) -> None:
        """End all decoders."""
        self._threads.shutdown(cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().end()

    def _decode(self, body: bytes, boxes: Any) -> tuple[dict[str, Any], bytes | None]:
        decoder = self._idle.get()
        started = time.monotonic()
        try:
            for _ in range(2):
                try:
                    return decoder.decode(body, boxes)
                except _LostError as error:
                    lost = error
            return {"status": Status.FAILED_TO_RESIZE, "reason": lost.reason, "detail": str(lost)}, None
        finally:
            self._idle.put(decoder)
            metrics.step_seconds().observe(time.monotonic() - started, tags={"step": "decode"})


class _LostError(Exception):
    """The decoder ended, or was ended, over a body."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class _Decoder:
    """One decoder process, started anew after each that was lost. One thread at a time."""

    def __init__(self, config: IngestConfig) -> None:
        self._config = config
        self._process: subprocess.Popen[bytes] | None = None

    def decode(self, body: bytes, boxes: Any) -> tuple[dict[str, Any], bytes | None]:
        process = self._process or self._start()
        try:
            send(_stream(process.stdin), boxes, body)
            if not _readable(process, self._config.decode_s):
                self._kill()
                raise _LostError(Reason.DECODE_TIMEOUT, f"not decoded in {self._config.decode_s:g} s")
            facts, picture = receive(_stream(process.stdout))
        except (EOFError, OSError):
            raise _LostError(Reason.DECODER_CRASH, f"the decoder ended with {self._ended()}") from None
        return facts, picture or None

    def end(self) -> None:
        """End the process, which waits for work."""
        if self._process is not None:
            with contextlib.suppress(OSError):
                _stream(self._process.stdin).close()
            self._process.wait()
            _stream(self._process.stdout).close()
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        for _ in range(STARTS):
            if self._started():
                assert self._process is not None
                return self._process
        raise RunError("the decoder process (python -m ingest.decoder) does not start; run it by hand")

    def _started(self) -> bool:
        # `sys.path` goes along: a source tree that Ray brought lies where only this process looks.
        paths = os.pathsep.join(path for path in sys.path if path)
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "ingest.decoder"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self._process = process
        try:
            for stream in (process.stdin, process.stdout):
                _widen(_stream(stream))
            send(_stream(process.stdin), self._config.model_dump(mode="json"))
            if not _readable(process, STARTS_IN_S):
                raise EOFError
            receive(_stream(process.stdout))
        except (EOFError, OSError):
            self._kill()
            return False
        return True

    def _ended(self) -> str:
        """Return how the process ended, in words."""
        process, self._process = self._process, None
        assert process is not None
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                _stream(stream).close()
        code = process.wait()
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._ended()


def _stream(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def _readable(process: subprocess.Popen[bytes], seconds: float) -> bool:
    poll = select.poll()
    poll.register(_stream(process.stdout), select.POLLIN | select.POLLHUP)
    return bool(poll.poll(seconds * 1000))


def _widen(pipe: IO[bytes]) -> None:
    """Let a whole picture fit in the pipe, so that neither side waits for the other in the midst of one."""
    if _SET_PIPE_SIZE is not None:
        with contextlib.suppress(OSError):  # a bound of the system's; it goes on with the size there is
            fcntl.fcntl(pipe, _SET_PIPE_SIZE, _PIPE_BYTES)
