"""One HTTP exchange, bounded in every direction: connect, first byte, time, rate, bytes on the wire and unpacked."""

from __future__ import annotations

import asyncio
import email.utils
import ssl
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from urllib.parse import urljoin

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from infra import metrics
from ingest.addresses import literal_address
from ingest.config import FetchConfig
from ingest.connection import connection_times, connector
from ingest.consent import MAX_ROBOTS_BYTES, RobotsAnswer, opt_out_evidence
from ingest.content_encoding import still_encoded, unpacker
from ingest.image import Refusal
from ingest.resolver import BlockedAddressError, UnresolvedError
from ingest.urls import as_sent
from shards.layout import Reason, Status

REDIRECTS = frozenset((301, 302, 303, 307, 308))
TRANSIENT_STATUSES = frozenset((429, *range(500, 600))) - {501, 505, 510}
"""Answers after which another try may do better: `wait`, and all by which a server says that the fault is its own.

Not those that say that this very request will never be served: its method (501), its version of HTTP (505), the
extensions that it lacks (510).
"""
PASSING_TLS_ALERTS = frozenset(("TLSV1_ALERT_INTERNAL_ERROR", "UNEXPECTED_EOF_WHILE_READING"))
"""What ends a handshake for the moment, by OpenSSL's name; all else is about certificates, versions and ciphers."""
MAX_ROBOTS_REDIRECTS = 5
_SMALL_BYTES = 16 * 1024
_JUDGED_BYTES = 64 * 1024
_READ_BYTES = 128 * 1024

Judge = Callable[[bytes], Refusal | None]
"""Looks at the first bytes of a body; a refusal saves the download of the rest."""


@dataclass(frozen=True, slots=True)
class Body:
    """A body taken whole."""

    data: bytes
    http_status: int
    content_type: str | None
    still_encoded: str | None = None  # the Content-Encoding, where it was not unpacked


@dataclass(frozen=True, slots=True)
class Redirect:
    """The answer is elsewhere."""

    url: str
    http_status: int


@dataclass(frozen=True, slots=True)
class Miss:
    """No body, and why; `transient` when another try may do better."""

    status: Status
    reason: Reason
    detail: str
    transient: bool = False
    reached: bool = True  # whether the host answered at all
    http_status: int | None = None
    content_type: str | None = None
    retry_after_s: float | None = None
    opt_out: str | None = None
    refusal: Refusal | None = None


class RobotsUnreachableError(Exception):
    """The host did not say what it allows; `miss` is why. By RFC 9309, section 2.3.1.4, nothing is then."""

    def __init__(self, miss: Miss) -> None:
        super().__init__(miss.detail)
        self.miss = miss


_FAILURES = (
    BlockedAddressError, UnresolvedError, aiohttp.ClientError, HttpProcessingError, TimeoutError, OSError,
    ValueError,
)  # fmt: skip
"""What an exchange can end with that is nobody's mistake here."""


def _failed(reason: Reason, detail: object, *, transient: bool = False, reached: bool = True) -> Miss:
    text = " ".join(str(detail).split())[:200]
    return Miss(Status.FAILED_TO_DOWNLOAD, reason, text, transient, reached)


class Fetcher:
    """One HTTP client a process: one TLS context, kept connections, its own resolver. Make it inside a loop."""

    def __init__(self, config: FetchConfig, judge: Judge | None = None, judge_bytes: int = 2**20) -> None:
        """`judge` sees the start of bodies of more than `judge_bytes`, or of unknown length."""
        self._config, self._judge, self._judge_bytes = config, judge, judge_bytes
        self._session = aiohttp.ClientSession(
            connector=connector(config),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            headers={
                "User-Agent": config.agent_header,
                "Accept": "image/avif,image/webp,image/*;q=0.9,*/*;q=0.5",
                "Accept-Encoding": "identity",
            },
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=config.connect_s, sock_read=config.first_byte_s),
            read_bufsize=_READ_BYTES,
            max_line_size=32 * 1024,
            max_field_size=32 * 1024,
            trace_configs=[connection_times()],
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    async def ask(self, url: str, begun: Callable[[], None]) -> Body | Redirect | Miss:
        """Send one GET, without following a redirect. What can go wrong with it comes back as a `Miss`.

        `begun` is called once the head of an answer is there.
        """
        try:
            async with asyncio.timeout(self._config.total_s):
                target, clock = self._target(url), asyncio.get_running_loop().time
                asked = clock()
                async with self._session.get(target, allow_redirects=False) as response:
                    answered = clock()
                    begun()
                    metrics.step_seconds().observe(answered - asked, tags={"step": "first_byte"})
                    taken = await self._take(url, response)
                    if isinstance(taken, Body):
                        metrics.step_seconds().observe(clock() - answered, tags={"step": "body"})
                    return taken
        except _FAILURES as error:
            return _miss(error)

    async def ask_robots(self, url: str) -> RobotsAnswer:
        """Fetch a robots.txt, with its redirects. Raises RobotsUnreachableError when it cannot be had.

        A server error counts as that (RFC 9309, section 2.3.1.4), and so does 429, by which a host asks for patience.
        """
        try:
            async with asyncio.timeout(self._config.total_s):
                for _ in range(MAX_ROBOTS_REDIRECTS + 1):
                    async with self._session.get(self._target(url), allow_redirects=False) as response:
                        if response.status in REDIRECTS and "Location" in response.headers:
                            url = _moved_to(url, response)
                            continue
                        if response.status == 429 or response.status >= 500:
                            await _drain(response)
                            raise RobotsUnreachableError(replace(_refused(response), transient=True, reached=False))
                        return RobotsAnswer(response.status, await _robots_text(response))
        except _FAILURES as error:
            raise RobotsUnreachableError(_miss(error)) from None
        return RobotsAnswer(404)

    def _target(self, url: str) -> URL:
        target = URL(url)
        host = (target.raw_host or "").rstrip(".")
        if target.scheme not in ("http", "https") or not host:
            raise aiohttp.InvalidURL(url, "not an http or https URL")
        address = literal_address(host)
        if address is not None and not self._config.may_ask(address):
            raise BlockedAddressError(f"{host} is not a public address")
        return target

    async def _take(self, url: str, response: aiohttp.ClientResponse) -> Body | Redirect | Miss:
        status, moved = response.status, response.status in REDIRECTS and "Location" in response.headers
        if not moved and status not in (200, 203):
            await _drain(response)
            return _refused(response)
        content_type = response.headers.get("Content-Type")
        evidence = None
        if self._config.opt_out:
            agent = self._config.agent_token
            evidence = opt_out_evidence(response.headers.items(), self._config.opt_out, agent)
        if evidence is not None:
            response.close()
            return Miss(
                Status.FILTERED, Reason.OPT_OUT, evidence,
                http_status=status, content_type=content_type, opt_out=evidence,
            )  # fmt: skip
        if moved:
            location = _moved_to(url, response)
            await _drain(response)
            return Redirect(location, status)
        taken = await self._body(response)
        if isinstance(taken, bytes):
            return Body(taken, status, content_type, still_encoded(response.headers.get("Content-Encoding")))
        response.close()
        if isinstance(taken, Refusal):
            return Miss(
                taken.status, taken.reason, taken.detail,
                http_status=status, content_type=content_type, refusal=taken,
            )  # fmt: skip
        return Miss(
            taken.status, taken.reason, taken.detail, taken.transient,
            http_status=status, content_type=content_type,
        )  # fmt: skip

    async def _body(self, response: aiohttp.ClientResponse) -> bytes | Refusal | Miss:
        """Read the body as it comes, and stop as soon as a bound is crossed or the judge refuses it."""
        config, clock = self._config, asyncio.get_running_loop().time
        length = response.content_length
        if length is not None and length > config.max_wire_bytes:
            return _failed(Reason.TOO_LARGE, f"{length} bytes announced, {config.max_wire_bytes} allowed")
        unpack = unpacker(response.headers.get("Content-Encoding"), config.max_body_bytes)
        chunks: list[bytes] = []
        wire = size = 0
        started, to_judge = (
            clock(),
            self._judge is not None and (length is None or length > self._judge_bytes),
        )
        async for chunk in response.content.iter_any():
            wire += len(chunk)
            if wire > config.max_wire_bytes:
                return _failed(Reason.TOO_LARGE, f"more than {config.max_wire_bytes} bytes")
            if unpack is not None:
                try:
                    chunk = unpack(chunk)
                except zlib.error as error:
                    return _failed(Reason.TRUNCATED_BODY, f"content encoding: {error}")
            size += len(chunk)
            if size > config.max_body_bytes:
                return _failed(Reason.TOO_LARGE, f"more than {config.max_body_bytes} bytes unpacked")
            chunks.append(chunk)
            if to_judge and self._judge is not None and not response.content.at_eof():
                refusal = self._judge(b"".join(chunks))
                if refusal is not None:
                    return refusal
                to_judge = size < _JUDGED_BYTES
            elapsed = clock() - started
            if elapsed > config.slow_grace_s and wire < config.min_bytes_per_s * elapsed:
                return _failed(Reason.TOO_SLOW, f"less than {config.min_bytes_per_s:g} bytes a second")
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _refused(response: aiohttp.ClientResponse) -> Miss:
    """Return what an answer other than a success comes to."""
    return Miss(
        Status.FAILED_TO_DOWNLOAD, Reason.HTTP_STATUS, f"HTTP {response.status}",
        transient=response.status in TRANSIENT_STATUSES, http_status=response.status,
        retry_after_s=retry_after_s(response.headers.get("Retry-After")),
    )  # fmt: skip


def retry_after_s(value: str | None) -> float | None:
    """Return what a Retry-After header asks for, in seconds from now; None without a readable one."""
    if not value:
        return None
    if value.isascii() and value.strip().isdigit():
        return float(value)
    try:
        until = email.utils.parsedate_to_datetime(value)
        until = until if until.tzinfo else until.replace(tzinfo=UTC)
        return max(0.0, (until - datetime.now(UTC)).total_seconds())
    except (ValueError, OverflowError):
        return None


def _miss(error: BaseException) -> Miss:
    """Name what went wrong; the order of the tests matters, since aiohttp's errors inherit from one another."""
    kind, text = type(error).__name__, str(error)
    if isinstance(error, BlockedAddressError):
        return _failed(Reason.BLOCKED_ADDRESS, text)
    if isinstance(error, UnresolvedError):
        return _failed(Reason.DNS, text, transient=error.transient, reached=False)
    if isinstance(error, aiohttp.ClientSSLError | ssl.SSLError):
        return _failed(Reason.TLS, text, transient=_may_pass(error), reached=False)
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return _failed(Reason.TIMEOUT, "no connection in time", transient=True, reached=False)
    if isinstance(error, TimeoutError):
        return _failed(Reason.TIMEOUT, "no answer in time", transient=True, reached=False)
    if isinstance(error, aiohttp.InvalidURL):
        return _failed(Reason.BAD_URL, text)
    if isinstance(error, aiohttp.ClientConnectorError):
        return _failed(Reason.CONNECT, text, transient=True, reached=False)
    if isinstance(error, aiohttp.ClientPayloadError):
        return _failed(Reason.TRUNCATED_BODY, text, transient=True)
    if isinstance(error, aiohttp.ServerDisconnectedError | OSError):
        return _failed(Reason.CONNECTION_RESET, f"{kind}: {text}", transient=True, reached=False)
    if isinstance(error, aiohttp.ClientError | HttpProcessingError):
        words = str(getattr(error, "message", text)).split("\n", 1)[0]  # what follows are the bytes received
        return _failed(Reason.CONNECTION_RESET, f"not HTTP: {kind}: {words}")
    return _failed(Reason.BAD_URL, f"{kind}: {text}")


def _may_pass(error: aiohttp.ClientSSLError | ssl.SSLError) -> bool:
    """Tell whether a TLS failure may be one of the moment: the other side hung up, or had a fault of its own."""
    cause = error.__cause__ if isinstance(error, aiohttp.ClientSSLError) else error
    hung_up = isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError | ssl.SSLSyscallError)
    return hung_up or getattr(cause, "reason", None) in PASSING_TLS_ALERTS


def _moved_to(url: str, response: aiohttp.ClientResponse) -> str:
    """Return the address that an answer redirects to. Raises InvalidURL for one that no request can be made of."""
    location = response.headers["Location"]
    sent = as_sent(urljoin(url, location))
    if sent is None:
        raise aiohttp.InvalidURL(location[:100], "redirected to what is no URL, or too long a one")
    return sent


async def _drain(response: aiohttp.ClientResponse) -> None:
    """Read a short body that nobody wants, so that its connection can be kept; a long one costs the connection."""
    if response.content_length is not None and response.content_length <= _SMALL_BYTES:
        await response.read()
    else:
        response.close()


async def _robots_text(response: aiohttp.ClientResponse) -> str:
    if response.status != 200:
        await _drain(response)
        return ""
    unpack = unpacker(response.headers.get("Content-Encoding"), MAX_ROBOTS_BYTES)
    text = b""
    async for chunk in response.content.iter_any():
        try:
            text += unpack(chunk) if unpack else chunk
        except zlib.error:
            break
        if len(text) > MAX_ROBOTS_BYTES:
            response.close()
            break
    return text[:MAX_ROBOTS_BYTES].decode("utf-8-sig", "replace")
