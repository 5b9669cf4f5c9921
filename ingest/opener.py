"""What the peer's requests go through: urllib, bound to who asks, whom, by which certificates and how far."""

from __future__ import annotations

import functools
import http.client
import io
import socket
import urllib.error
import urllib.request
import urllib.response
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from typing import IO, Any

from ingest.config import FetchConfig
from ingest.connection import tls_context
from ingest.peer_words import verdict
from ingest.resolver import BlockedAddressError
from shards.layout import Status


class StoppedError(Exception):
    """Nothing more is sent; the message says why."""


class FinalError(Exception):
    """The URL has failed before in a way that another try does not mend; the message is that failure's."""


class SentOnError(Exception):
    """A chain of redirects is longer than allowed."""


@dataclass(slots=True)
class Asked:
    """What a URL has answered so far; `attempts` leaves out its redirects, the rest is of the last attempt.

    `failure` is what it failed with for good, `refusing` the headers of an answer that is not ours to take.
    """

    attempts: int = 0
    http_status: int | None = None
    final_url: str | None = None
    content_type: str | None = None
    robots_tag: str | None = None
    failure: str | None = None
    refusing: Message | None = None


class Opener:
    """Stands in for urllib's opener in this process while it is `installed`; for threads as well.

    Sends the honest User-Agent, follows no more than `max_redirects` and none to other schemes than http and
    https, connects to no address that `FetchConfig.may_ask` refuses (after resolution, on every redirect), trusts
    `ca_bundle`. Like the native engine it does not look for proxies in the environment.

    The peer asks again whatever it has not got. What failed for good (a 4xx but 429, an address that may not be
    asked, a certificate) fails here again with the same words, and an answer whose headers `is_refusal` says are
    an opt-out is given again without its body: in both cases no request is sent.

    Raises:
        UserError: the bundle cannot be read.
    """

    def __init__(self, config: FetchConfig, is_refusal: Callable[[Message], bool] | None = None) -> None:
        self.config = config
        self.is_refusal = is_refusal
        self.context = tls_context(config)
        self.asked: dict[str, Asked] = {}
        self._stopped: str | None = None
        self._director = _Director(self)
        for handler in (
            _Plain(self), _Secure(self), _Redirects(self), _Notes(self), urllib.request.UnknownHandler(),
            urllib.request.HTTPDefaultErrorHandler(), urllib.request.HTTPErrorProcessor(),
        ):  # fmt: skip
            self._director.add_handler(handler)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Answer all of this process' `urllib.request.urlopen` inside the block."""
        before = getattr(urllib.request, "_opener", None)
        urllib.request.install_opener(self._director)
        try:
            yield
        finally:
            urllib.request.install_opener(before)  # None is how it was at the start

    def ask(self, send: Callable[[], Any], url: str) -> Any:
        """Send a request that urllib is given, unless its end is known. Raises what `send` does, and FinalError."""
        known = self.asked.get(url)
        if known is not None and known.failure is not None:
            raise FinalError(known.failure)
        if known is not None and known.refusing is not None:
            return urllib.response.addinfourl(io.BytesIO(), known.refusing, url, known.http_status)
        try:
            answer = send()
        except Exception as error:
            note = self.asked.get(url)  # none where nothing was sent
            status = error.code if isinstance(error, urllib.error.HTTPError) else None
            if note is not None and not verdict(Status.FAILED_TO_DOWNLOAD, str(error), None, status)[3]:
                note.failure = str(error)
            raise
        if self.is_refusal is not None and self.is_refusal(answer.headers):
            self.asked[url].refusing = answer.headers
        return answer

    def stop(self, why: str) -> None:
        """Refuse every request from now on; those under way come to their end."""
        self._stopped = why

    def begins(self, request: urllib.request.Request) -> None:
        """Note a request that is about to be sent. Raises StoppedError."""
        if self._stopped is not None:
            raise StoppedError(self._stopped)
        if not hasattr(request, "first_url"):
            before = self.asked.get(request.full_url)
            self.asked[request.full_url] = Asked(1 + (before.attempts if before else 0))

    def connect(self, address: tuple[str, int], timeout: float, source: tuple[str, int] | None = None) -> socket.socket:
        """Connect to a host, by one of its addresses that may be asked.

        Raises:
            BlockedAddressError: it has none.
            OSError: the name does not resolve, or no address can be reached.
        """
        host, port = address
        found = [str(one[4][0]) for one in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        allowed = [one for one in found if self.config.may_ask(one)]
        if not allowed:
            raise BlockedAddressError(f"{host} is {found[0]}, not a public address")
        for one in allowed:
            try:
                connected = socket.create_connection((one, port), min(timeout, self.config.connect_s), source)
            except OSError:
                if one == allowed[-1]:
                    raise
            else:
                connected.settimeout(timeout)
                return connected
        raise AssertionError

    def connection(self, kind: type[http.client.HTTPConnection], host: str, **more: Any) -> http.client.HTTPConnection:
        """Return a connection that is made by `connect`; its other arguments are urllib's."""
        made = kind(host, **more)
        made._create_connection = self.connect  # type: ignore[attr-defined]
        return made


class _Director(urllib.request.OpenerDirector):
    def __init__(self, opener: Opener) -> None:
        super().__init__()
        self._opener = opener

    def open(self, fullurl: Any, data: Any = None, timeout: Any = None) -> Any:
        send = functools.partial(super().open, fullurl, data, timeout)
        if hasattr(fullurl, "first_url"):  # urllib follows redirects through here
            return send()
        return self._opener.ask(send, fullurl if isinstance(fullurl, str) else fullurl.full_url)


class _Plain(urllib.request.HTTPHandler):
    def __init__(self, opener: Opener) -> None:
        super().__init__()
        self._opener = opener

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        made = functools.partial(self._opener.connection, http.client.HTTPConnection)
        return self.do_open(made, request)


class _Secure(urllib.request.HTTPSHandler):
    def __init__(self, opener: Opener) -> None:
        super().__init__(context=opener.context)
        self._opener = opener

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        made = functools.partial(self._opener.connection, http.client.HTTPSConnection)
        return self.do_open(made, request, context=self._opener.context)


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_repeats = 1

    def __init__(self, opener: Opener) -> None:
        self._most = opener.config.max_redirects

    def redirect_request(
        self, request: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if len(getattr(request, "redirect_dict", ())) >= self._most:
            raise SentOnError(f"more than {self._most} redirects, the last to {newurl}")
        followed = super().redirect_request(request, fp, code, msg, headers, newurl)
        if followed is not None:
            followed.first_url = _first_url(request)  # type: ignore[attr-defined]
        return followed


class _Notes(urllib.request.BaseHandler):
    """Sees each request before it is sent and each answer before it is judged."""

    handler_order = 400  # ahead of what turns answers into errors

    def __init__(self, opener: Opener) -> None:
        self._opener = opener

    def http_request(self, request: urllib.request.Request) -> urllib.request.Request:
        self._opener.begins(request)
        request.add_header("User-agent", self._opener.config.agent_header)
        return request

    def http_response(self, request: urllib.request.Request, answer: Any) -> Any:
        note = self._opener.asked[_first_url(request)]
        note.http_status, note.final_url = answer.status, request.full_url
        note.content_type = answer.headers.get("Content-Type")
        note.robots_tag = ", ".join(answer.headers.get_all("X-Robots-Tag", ())) or None
        return answer

    https_request, https_response = http_request, http_response


def _first_url(request: urllib.request.Request) -> str:
    return getattr(request, "first_url", request.full_url)
