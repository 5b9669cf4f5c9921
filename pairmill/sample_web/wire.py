"""Answers written to the connection byte by byte, for what a well-behaved HTTP library refuses to send."""

from __future__ import annotations

import asyncio
import functools
import socket
import struct
import zlib
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web

BOMB_BYTES = 256 * 2**20
NEVER_ENDING_CHUNK_BYTES = 65_536


class Spent(web.StreamResponse):
    """Stands for an answer that is on the wire already: aiohttp adds nothing and closes the connection."""

    def __init__(self) -> None:
        super().__init__()
        self.force_close()

    async def prepare(self, request: web.BaseRequest) -> Any:
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        return None


def head(headers: dict[str, str], status: str = "200 OK") -> bytes:
    """The status line and headers of an answer after which the connection closes."""
    lines = [
        f"HTTP/1.1 {status}",
        *(f"{name}: {value}" for name, value in headers.items()),
        "Connection: close",
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")


async def send(request: web.Request, parts: AsyncIterator[bytes]) -> Spent:
    """Writes the parts as they come, until there are no more or the client is gone, then closes."""
    transport = request.transport
    async for part in parts:
        if transport is None or transport.is_closing():
            break
        transport.write(part)
        try:
            await request.writer.drain()
        except ConnectionError:
            break
    if transport is not None:
        transport.close()
    return Spent()


async def once(*parts: bytes) -> AsyncIterator[bytes]:
    """The parts, one after the other."""
    for part in parts:
        yield part


async def dripping(first: bytes, body: bytes, every_s: float) -> AsyncIterator[bytes]:
    """`first` at once, then one byte of the body every `every_s` seconds."""
    yield first
    for position in range(len(body)):
        yield body[position : position + 1]
        await asyncio.sleep(every_s)


async def never_ending(first: bytes) -> AsyncIterator[bytes]:
    """`first`, then zeros as fast as they are taken."""
    yield first
    zeros = bytes(NEVER_ENDING_CHUNK_BYTES)
    while True:
        yield zeros
        await asyncio.sleep(0)


async def silence() -> AsyncIterator[bytes]:
    """Nothing, until the client goes away."""
    await asyncio.Event().wait()
    yield b""


def chunk(part: bytes) -> bytes:
    """The part as one chunk (RFC 9112, section 7.1)."""
    return f"{len(part):x}\r\n".encode() + part + b"\r\n"


def reset(request: web.Request) -> Spent:
    """Ends the connection with a TCP reset instead of a close."""
    transport = request.transport
    if transport is not None:
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    return Spent()


@functools.cache
def gzip_bomb() -> bytes:
    """Gzip of BOMB_BYTES zeros: about 260 KB. Takes half a second, once."""
    packer = zlib.compressobj(9, wbits=31)
    zeros = bytes(2**20)
    return b"".join([*(packer.compress(zeros) for _ in range(BOMB_BYTES // 2**20)), packer.flush()])
