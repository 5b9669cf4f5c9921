"""A proxy before a real S3 server that fails on command: real sockets, one connection a request."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Fault = Literal["none", "503", "403", "half, then closed", "half, then silent", "silent"]
_REFUSALS = {
    "503": ("503 Slow Down", "SlowDown", "Please reduce your request rate."),
    "403": ("403 Forbidden", "AccessDenied", "Access Denied."),
}


@dataclass
class FaultyS3:
    """What goes wrong from now on: `fault` in the answers to `times` GETs of names with `match` in them."""

    upstream_port: int
    port: int = 0
    fault: Fault = "none"
    match: str = ".tar"
    times: int = 0
    asked: int = 0
    """GETs of names with `match` that came in."""

    def fail(self, fault: Fault, times: int = 1_000_000, match: str = ".tar") -> None:
        """Answer the next `times` GETs of names with `match` in them with `fault`."""
        self.fault, self.match, self.times, self.asked = fault, match, times, 0

    def _next(self, head: bytes) -> Fault:
        method, path = head.split(b" ", 2)[:2]
        if method != b"GET" or self.match not in path.decode():
            return "none"
        self.asked += 1
        self.times -= 1
        return self.fault if self.times >= 0 else "none"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request, and close."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            fault = self._next(head)
            if fault in _REFUSALS:
                writer.write(_refusal(*_REFUSALS[fault]))
            elif fault == "silent":
                await asyncio.sleep(3600)
            else:
                await self._forward(head, writer, fault)
            await writer.drain()
        writer.close()

    async def _forward(self, head: bytes, writer: asyncio.StreamWriter, fault: Fault) -> None:
        # The client's Host header goes along as it is, since the signature covers it.
        answers, requests = await asyncio.open_connection("127.0.0.1", self.upstream_port)
        first, _, fields = head.partition(b"\r\n")
        kept = [line for line in fields.split(b"\r\n") if line and not line.lower().startswith(b"connection:")]
        requests.write(b"\r\n".join([first, *kept, b"Connection: close", b"", b""]))
        answer = await answers.read()
        requests.close()
        if fault == "none":
            writer.write(answer)
            return
        start, blank, body = answer.partition(b"\r\n\r\n")
        writer.write(start + blank + body[: len(body) // 2])
        await writer.drain()
        if fault == "half, then silent":
            await asyncio.sleep(3600)


def _refusal(status: str, code: str, message: str) -> bytes:
    body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\nConnection: close"
    return f"{head}\r\n\r\n{body}".encode()


@contextlib.contextmanager
def faulty(upstream_port: int) -> Iterator[FaultyS3]:
    """Run the proxy in a thread of its own."""
    proxy, ready = FaultyS3(upstream_port), threading.Event()
    loop = asyncio.new_event_loop()

    async def run() -> None:
        server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
        proxy.port = server.sockets[0].getsockname()[1]
        ready.set()
        await asyncio.Event().wait()

    def body() -> None:
        with contextlib.suppress(asyncio.CancelledError), asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(run())

    thread = threading.Thread(target=body)
    thread.start()
    ready.wait()
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(loop)])
        thread.join()
