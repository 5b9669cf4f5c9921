"""The bounds on what the peer asks: who it says it is, which addresses it reaches, whose certificates it takes."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from infra.errors import UserError
from ingest.config import FetchConfig
from ingest.opener import Opener, SentOnError, StoppedError
from ingest.resolver import BlockedAddressError


class Server(ThreadingHTTPServer):
    """`/ok` answers; `/to/N/...` redirects N times; `/away?URL` redirects there; `/status/N` answers with N."""

    daemon_threads = True
    agents: list[str]

    class RequestHandlerClass(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.server.agents.append(self.headers["User-Agent"])  # type: ignore[attr-defined]
            path, _, away = self.path.partition("?")
            hops = int(path.removeprefix("/to/")) if path.startswith("/to/") else 0
            target = away or (f"/to/{hops - 1}" if hops else "")
            status = int(path.removeprefix("/status/")) if path.startswith("/status/") else 200
            self.send_response(302 if target else status)
            if target:
                self.send_header("Location", target)
            self.send_header("Content-Type", "image/jpeg")
            self.send_header("X-Robots-Tag", "otherbot: noai")
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, *_told: Any) -> None: ...

    def __init__(self, address: str = "127.0.0.1", context: ssl.SSLContext | None = None) -> None:
        super().__init__((address, 0), self.RequestHandlerClass)
        self.agents = []
        self.scheme = "https" if context else "http"
        if context:
            self.socket = context.wrap_socket(self.socket, server_side=True)

    def url(self, path: str) -> str:
        return f"{self.scheme}://{self.server_address[0]}:{self.server_address[1]}{path}"


@contextmanager
def running(server: Server) -> Iterator[Server]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    with running(Server()) as one:
        yield one


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate of 127.0.0.1's own, and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    today = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(today - datetime.timedelta(days=1))
        .not_valid_after(today + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    text = made.public_bytes(serialization.Encoding.PEM)
    text += key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    (tmp_path / "own.pem").write_bytes(text)
    return tmp_path / "own.pem"


def ask(url: str, opener: Opener) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0 (a browser)"})
    with opener.installed(), urllib.request.urlopen(request, timeout=5) as answer:
        data: bytes = answer.read()
    return data


def test_it_says_who_it_is_and_notes_what_came(server: Server) -> None:
    opener = Opener(FetchConfig(allow_private=True, contact="crawl@example.org"))
    assert ask(server.url("/to/2"), opener) == b"ok"
    assert server.agents == ["Pairmill/0.1 (+crawl@example.org)"] * 3
    note = opener.asked[server.url("/to/2")]
    assert (note.attempts, note.http_status, note.content_type) == (1, 200, "image/jpeg")
    assert (note.final_url, note.robots_tag) == (server.url("/to/0"), "otherbot: noai")
    ask(server.url("/to/2"), opener)
    assert opener.asked[server.url("/to/2")].attempts == 2


def test_outside_of_its_block_urllib_is_as_it_was(server: Server) -> None:
    opener = Opener(FetchConfig())
    with pytest.raises(BlockedAddressError):
        ask(server.url("/ok"), opener)
    plain = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with plain.open(server.url("/ok"), timeout=5) as answer:
        assert answer.read() == b"ok"
    assert urllib.request._opener is not opener._director  # type: ignore[attr-defined]


def test_a_redirect_to_an_address_that_is_not_public_is_not_followed(server: Server) -> None:
    with running(Server("127.0.0.2")) as inside:
        opener = Opener(FetchConfig(allow_networks=("127.0.0.1/32",)))
        assert ask(server.url("/ok"), opener) == b"ok"
        with pytest.raises(BlockedAddressError, match=r"127\.0\.0\.2 is 127\.0\.0\.2, not a public address"):
            ask(server.url(f"/away?{inside.url('/ok')}"), opener)
        assert inside.agents == []


@pytest.mark.parametrize("host", ["localhost", "2130706433", "0x7f.1", "127.1"])
def test_every_form_of_an_address_is_seen_through(server: Server, host: str) -> None:
    with pytest.raises(BlockedAddressError):
        ask(f"http://{host}:{server.server_address[1]}/ok", Opener(FetchConfig()))
    assert server.agents == []


def test_redirects_are_counted_and_stay_with_http(server: Server) -> None:
    opener = Opener(FetchConfig(allow_private=True, max_redirects=2))
    assert ask(server.url("/to/2"), opener) == b"ok"
    with pytest.raises(SentOnError, match="more than 2 redirects"):
        ask(server.url("/to/3"), opener)
    with pytest.raises(SentOnError, match="more than 0 redirects"):
        ask(server.url("/to/1"), Opener(FetchConfig(allow_private=True, max_redirects=0)))
    for away in ("ftp://127.0.0.1/a.jpg", "file:///etc/hostname"):
        with pytest.raises(urllib.error.URLError):
            ask(server.url(f"/away?{away}"), opener)


def test_certificates_are_those_of_the_configuration(certificate: Path, tmp_path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with running(Server(context=context)) as server:
        for trusting in ({"ca_bundle": str(certificate)}, {"verify_tls": False}):
            assert ask(server.url("/ok"), Opener(FetchConfig(allow_private=True, **trusting))) == b"ok"
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            ask(server.url("/ok"), Opener(FetchConfig(allow_private=True)))
    with pytest.raises(UserError, match=r"fetch\.ca_bundle"):
        Opener(FetchConfig(ca_bundle=str(tmp_path / "nothing.pem")))


@pytest.mark.parametrize(
    ("path", "sent"),
    [("/status/404", 1), ("/status/403", 1), ("/status/503", 3), ("/status/429", 3), ("/to/3", 3)],
)
def test_what_failed_for_good_is_not_sent_again(server: Server, path: str, sent: int) -> None:
    opener = Opener(FetchConfig(allow_private=True, max_redirects=2))
    words = set()
    for _ in range(3):
        with pytest.raises(Exception, match=r"HTTP Error|more than 2 redirects") as caught:
            ask(server.url(path), opener)
        words.add(str(caught.value))
    assert len(words) == 1
    assert len(server.agents) == sent
    assert opener.asked[server.url(path)].attempts == (3 if sent == 3 and "status" in path else 1)


def test_an_opt_out_is_not_sent_again(server: Server) -> None:
    opener = Opener(FetchConfig(allow_private=True), lambda headers: headers["X-Robots-Tag"] == "otherbot: noai")
    assert ask(server.url("/ok"), opener) == b"ok"
    request = urllib.request.Request(server.url("/ok"))
    with opener.installed(), urllib.request.urlopen(request, timeout=5) as answer:
        assert (answer.headers["X-Robots-Tag"], answer.read()) == ("otherbot: noai", b"")
    assert len(server.agents) == 1


def test_once_stopped_nothing_is_sent(server: Server) -> None:
    opener = Opener(FetchConfig(allow_private=True))
    opener.stop("the shard is given up")
    with pytest.raises(StoppedError, match="given up"):
        ask(server.url("/ok"), opener)
    assert server.agents == []
