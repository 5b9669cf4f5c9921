"""Connections: to whom one may be made, how it is secured, and how much may come over it before an answer."""

from __future__ import annotations

import asyncio
import functools
import resource
import socket
import ssl
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import AddrInfoType
from aiohttp.http_exceptions import HttpProcessingError

from infra import metrics
from infra.errors import UserError
from ingest.config import FetchConfig
from ingest.resolver import BlockedAddressError, Resolver

KEPT_S = 15.0
"""How long a connection that nobody uses is kept, in seconds."""
MAX_HEADS = 32
"""Heads of answers (`100 Continue` is one) that may have come to one request without being read."""


def connector(config: FetchConfig) -> aiohttp.TCPConnector:
    """Return what makes and keeps a process' connections. Make it inside a loop."""
    _raise_file_limit()
    made = aiohttp.TCPConnector(
        limit=0,
        resolver=Resolver(config),
        use_dns_cache=False,
        ssl=tls_context(config),
        keepalive_timeout=KEPT_S,
        socket_factory=functools.partial(_socket, config),
    )
    # There is no public way to give it one's own kind of connection.
    made._factory = functools.partial(_Answers, loop=asyncio.get_running_loop())  # type: ignore[assignment]
    return made


def _socket(config: FetchConfig, address: AddrInfoType) -> socket.socket:
    """Make the socket for one address, the last moment at which it can be refused, however it was come by."""
    family, kind, protocol, _, place = address
    if not config.may_ask(str(place[0])):
        raise BlockedAddressError(f"{place[0]} is not a public address")
    return socket.socket(family, kind, protocol)


class _Answers(ResponseHandler):
    """One connection, given up when interim answers come faster than they are read.

    A socket that always has more to read keeps an event loop from everything else, timeouts included.
    """

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if len(self) > MAX_HEADS and self.transport is not None:
            self.transport.abort()
            self.set_exception(HttpProcessingError(message="a flood of interim answers"))


def tls_context(config: FetchConfig) -> ssl.SSLContext:
    """Build the process' one TLS context (about 30 ms with a system's bundle). Raises UserError for a bad bundle."""
    try:
        context = ssl.create_default_context(cafile=config.ca_bundle)
    except (OSError, ssl.SSLError) as error:
        raise UserError(f"fetch.ca_bundle {config.ca_bundle}: cannot be read as certificates: {error}") from None
    if not config.verify_tls:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def connection_times() -> aiohttp.TraceConfig:
    """Return what tells the metrics how long each new connection took."""
    trace = aiohttp.TraceConfig()

    async def begun(_session: aiohttp.ClientSession, context: Any, _: aiohttp.TraceConnectionCreateStartParams) -> None:
        context.begun = asyncio.get_running_loop().time()

    async def made(_session: aiohttp.ClientSession, context: Any, _: aiohttp.TraceConnectionCreateEndParams) -> None:
        taken_s = asyncio.get_running_loop().time() - context.begun
        metrics.step_seconds().observe(taken_s, tags={"step": "connect"})

    trace.on_connection_create_start.append(begun)
    trace.on_connection_create_end.append(made)
    return trace


def _raise_file_limit() -> None:
    """Let the process hold as many connections as the system allows it; soft limits are often 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
