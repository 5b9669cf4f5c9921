"""The crawler against a server that misbehaves: what each thing is called, what it costs, and what is never asked."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import socketserver
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop
from yarl import URL

from infra.errors import UserError
from ingest.config import FetchConfig
from ingest.connection import tls_context
from ingest.crawl import MOST_FAULTS, Crawler, Errand, Fetched, Visit
from ingest.fetch import Fetcher, retry_after_s
from pairmill.sample_web.process import SampleWeb
from shards.layout import Reason, Status

DOWNLOAD = Status.FAILED_TO_DOWNLOAD


def crawl(config: FetchConfig, urls: list[str], retries_left: int = 1000, **options: Any) -> list[Fetched]:
    """Fetch the URLs as one errand; results in the order of the URLs."""

    async def main() -> list[Fetched]:
        crawler = Crawler(config, options.pop("workers", 1), options.pop("judge", None), 0)
        results: dict[int, Fetched] = {}
        ended = asyncio.Event()

        def deliver(index: int, fetched: Fetched) -> None:
            results[index] = fetched
            if len(results) == len(urls):
                ended.set()

        errand = Errand(deliver, retries_left)
        try:
            for index, url in enumerate(urls):
                crawler.send(Visit(errand, index, url, str(index)))
            waiting = asyncio.create_task(ended.wait())
            done, _ = await asyncio.wait((waiting, crawler.broken), timeout=60, return_when=asyncio.FIRST_COMPLETED)
            if crawler.broken in done:
                crawler.broken.result()
            assert waiting in done
            assert crawler.room.is_set()
        finally:
            await crawler.close()
        return [results[index] for index in range(len(urls))]

    with asyncio.Runner(loop_factory=options.pop("loop", None)) as runner:
        return runner.run(main())


@pytest.mark.parametrize(
    ("kind", "status", "reason", "attempts"),
    [
        ("not_found", DOWNLOAD, Reason.HTTP_STATUS, 1),
        ("unavailable", DOWNLOAD, Reason.HTTP_STATUS, 3),
        ("error_once", Status.SUCCESS, Reason.NONE, 2),
        ("too_many_requests", Status.SUCCESS, Reason.NONE, 2),
        ("cut_short", DOWNLOAD, Reason.TRUNCATED_BODY, 3),
        ("chunks_cut_short", DOWNLOAD, Reason.TRUNCATED_BODY, 3),
        ("reset", DOWNLOAD, Reason.CONNECTION_RESET, 3),
        ("redirect", Status.SUCCESS, Reason.NONE, 1),
        ("redirect_other_host", Status.SUCCESS, Reason.NONE, 1),
        ("redirect_loop", DOWNLOAD, Reason.TOO_MANY_REDIRECTS, 1),
        ("never_ending", DOWNLOAD, Reason.TOO_LARGE, 1),
        ("gzip_bomb", DOWNLOAD, Reason.TOO_LARGE, 1),
        ("noai", Status.FILTERED, Reason.OPT_OUT, 1),
        ("private", Status.FILTERED, Reason.ROBOTS_TXT, 0),
        ("refused", DOWNLOAD, Reason.CONNECT, 3),
        ("unknown_host", DOWNLOAD, Reason.DNS, 1),
        ("bad_url", DOWNLOAD, Reason.BAD_URL, 0),
    ],
)
def test_one_row(web: SampleWeb, near: FetchConfig, kind: str, status: Status, reason: Reason, attempts: int) -> None:
    web.reset()
    found = crawl(near, [web.url(kind)])[0]
    assert (found.status, found.reason) == (status, reason), found.detail
    assert found.attempts == attempts or (kind == "unknown_host" and found.attempts <= 3)
    assert (found.body is not None) == (status is Status.SUCCESS)
    assert web.log()["too_soon"] == 0


def test_a_hang_and_a_drip_end_in_time(web: SampleWeb, near: FetchConfig) -> None:
    hang, drip = crawl(near, [web.url("hang"), web.url("drip")])
    assert (hang.status, hang.reason) == (DOWNLOAD, Reason.TIMEOUT)
    assert hang.attempts == 3 + near.breaker_rests, "its host was well before, and gets its rests"
    assert (drip.status, drip.reason, drip.attempts) == (DOWNLOAD, Reason.TOO_SLOW, 1)


def test_evidence_and_addresses_are_kept(web: SampleWeb, near: FetchConfig) -> None:
    noai, private, moved = crawl(near, [web.url("noai"), web.url("private"), web.url("redirect_other_host")])
    assert noai.opt_out == "X-Robots-Tag: noai"
    assert noai.http_status == 200
    assert private.opt_out == "robots.txt: Disallow: /private/"
    assert private.http_status is None
    assert moved.final_url.startswith(web.base_urls[1] + "/images/")


def test_wishes_can_be_switched_off_and_robots_is_asked_once_a_host(web: SampleWeb, near: FetchConfig) -> None:
    web.reset()
    urls = [web.url(kind, host=host) for kind in ("private", "noai", "wrong_type", "redirect") for host in (0, 1)]
    assert sum(one.reason == Reason.ROBOTS_TXT for one in crawl(near, urls)) == 2
    assert web.log()["paths"]["/robots.txt"] == 2
    web.reset()
    off = near.model_copy(update={"robots": False, "opt_out": ()})
    assert all(one.status is Status.SUCCESS for one in crawl(off, urls))
    assert "/robots.txt" not in web.log()["paths"]
    web.set_robots_status(503)
    failed = crawl(near, urls[:1])[0]
    assert (failed.reason, failed.detail) == (Reason.HTTP_STATUS, "robots.txt: HTTP 503")
    assert failed.transient
    web.reset()


def test_private_addresses_are_not_asked_at_once_nor_after_a_redirect(web: SampleWeb, near: FetchConfig) -> None:
    web.reset()
    public = near.model_copy(update={"allow_private": False})
    port = web.base_urls[0].rpartition(":")[2]
    hosts = (
        "127.0.0.1",
        "localhost",
        "2130706433",
        "127.1",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "169.254.169.254",
    )
    for found in crawl(public, [f"http://{host}:{port}/images/x.jpg" for host in hosts]):
        assert (found.status, found.reason) in (
            (DOWNLOAD, Reason.BLOCKED_ADDRESS), (DOWNLOAD, Reason.DNS),
        )  # fmt: skip
        assert found.attempts <= 1 or found.reason is Reason.DNS
    assert web.log()["requests"] == 0


def test_a_redirect_may_not_lead_where_no_request_may_go(web: SampleWeb, near: FetchConfig) -> None:
    here = near.model_copy(update={"allow_private": False, "allow_networks": ("127.0.0.1/32",)})
    moved, near_by = crawl(here, [web.url("redirect_other_host"), web.url("redirect")])
    assert (moved.status, moved.reason) == (DOWNLOAD, Reason.BLOCKED_ADDRESS)
    assert "127.0.0.2" in (moved.detail or "")
    assert near_by.status is Status.SUCCESS


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("http://169.254.169.254/latest/meta-data/", Reason.BLOCKED_ADDRESS),
        ("//localhost:80/", Reason.BLOCKED_ADDRESS),
        ("file:///etc/passwd", Reason.BAD_URL),
        ("http://[broken/", Reason.BAD_URL),
        ("", Reason.TOO_MANY_REDIRECTS),
    ],
)
def test_redirects_to_odd_places(near: FetchConfig, location: str, reason: Reason) -> None:
    answer = f"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nConnection: close\r\nLocation: {location}\r\n\r\n"
    here = near.model_copy(update={"robots": False, "allow_private": False, "allow_networks": ("127.0.0.1/32",)})
    if "localhost" in location:
        here = here.model_copy(update={"allow_networks": ("127.0.0.3/32",)})
    with answering(answer.encode(), "127.0.0.3" if "localhost" in location else "127.0.0.1") as url:
        found = crawl(here, [url])[0]
    assert (found.status, found.reason) == (DOWNLOAD, reason), found.detail


@contextmanager
def answering(
    answer: bytes | dict[bytes, bytes],
    host: str = "127.0.0.1",
    *,
    asked: list[bytes] | None = None,
    hello: bool = False,
    again_s: float = 0.0,
) -> Iterator[str]:
    """Serve the same bytes to every connection, or those of its path (`b""`: of any other); yields the URL.

    `asked` gets the paths; `hello`: what comes is no HTTP; `again_s`: the bytes are sent again and again.
    """

    class Same(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            if hello:
                self.request.recv(64 * 1024)
                self.wfile.write(answer if isinstance(answer, bytes) else b"")
                return
            line = self.rfile.readline()
            if not line:  # who connected went away without a word
                return
            path = line.split(b" ")[1]
            while self.rfile.readline().strip():
                pass
            if asked is not None:
                asked.append(path)
            reply = answer if isinstance(answer, bytes) else answer.get(path, answer.get(b"", b""))
            with contextlib.suppress(ConnectionError):
                self.wfile.write(reply)
                while again_s:
                    time.sleep(again_s)
                    self.wfile.write(reply)

    class Quiet(socketserver.ThreadingTCPServer):
        daemon_threads = True
        request_queue_size = 128

    with Quiet((host, 0), Same) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://{host}:{server.server_address[1]}/a.jpg"
        finally:
            server.shutdown()


@pytest.mark.parametrize(
    ("head", "body", "reason"),
    [
        ("HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n", b"", Reason.TOO_LARGE),
        ("HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n", gzip.compress(b"x" * 5000, mtime=0), Reason.NONE),
        ("HTTP/1.1 200 OK\r\nContent-Encoding: deflate\r\n", zlib.compress(b"x" * 5000), Reason.NONE),
        ("HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n", b"x" * 5000, Reason.NONE),
        ("HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n", b"\x1f\x8bnot gzip", Reason.TRUNCATED_BODY),
        ("HTTP/1.1 204 No Content\r\n", b"", Reason.HTTP_STATUS),
        ("HTTP/1.1 200 OK\r\nTDM-Reservation: 1\r\n", b"x", Reason.OPT_OUT),
        ("HTTP/1.1 200 OK\r\nX-Robots-Tag: all\r\nX-Robots-Tag: noai\r\n", b"x", Reason.OPT_OUT),
        ("HTTP/1.1 302 Found\r\nX-Robots-Tag: noai\r\nLocation: /b.jpg\r\n", b"", Reason.OPT_OUT),
        ("HTTP/1.1 404 Not Found\r\nX-Robots-Tag: noindex\r\n", b"x", Reason.HTTP_STATUS),
        ("SMTP ready\r\n", b"", Reason.CONNECTION_RESET),
    ],
)
def test_odd_answers(near: FetchConfig, head: str, body: bytes, reason: Reason) -> None:
    with answering(head.encode() + b"Connection: close\r\n\r\n" + body) as url:
        found = crawl(near.model_copy(update={"robots": False}), [url])[0]
    assert found.reason is reason, found.detail
    if reason is Reason.NONE:
        assert found.body == b"x" * 5000


@pytest.mark.parametrize("host", ["①②⑦.0.0.1", "127。0。0。1", "１２７.0.0.1", "127.0.0.1.", "127.0.0.①"])
def test_an_address_in_digits_and_dots_of_other_scripts_is_seen_through(near: FetchConfig, host: str) -> None:
    public = near.model_copy(update={"allow_private": False})
    here = public.model_copy(update={"allow_networks": ("127.0.0.2/32",)})
    asked: list[bytes] = []
    with answering(b"HTTP/1.1 200 OK\r\n\r\nx", asked=asked) as url:
        port = url.split(":")[2]
        moved = f"HTTP/1.1 302 Found\r\nLocation: http://{host}:{port}\r\nContent-Length: 0\r\n\r\n".encode()
        with answering(moved, "127.0.0.2") as mover:
            robots_too = [crawl(config, [mover])[0] for config in (here, here.model_copy(update={"robots": False}))]
        found = crawl(public, [f"http://{host}:{port}"])
    for one in (*robots_too[1:], *found):
        assert (one.status, one.reason) == (DOWNLOAD, Reason.BLOCKED_ADDRESS), one.detail
    assert not asked


class UncheckedFetcher(Fetcher):
    """One that looks at no address before it asks."""

    def _target(self, url: str) -> URL:
        return URL(url)


def test_the_address_that_is_connected_to_is_looked_at_again(near: FetchConfig) -> None:
    async def main(url: str) -> Any:
        fetcher = UncheckedFetcher(near.model_copy(update={"allow_private": False}))
        try:
            return await fetcher.ask(url, lambda: None)
        finally:
            await fetcher.close()

    asked: list[bytes] = []
    with answering(b"HTTP/1.1 200 OK\r\n\r\nx", asked=asked) as url:
        assert asyncio.run(main(url)).reason is Reason.BLOCKED_ADDRESS
    assert not asked


def test_after_a_redirect_the_new_address_is_held_against_robots_txt(near: FetchConfig) -> None:
    asked: list[bytes] = []
    replies = {
        b"/robots.txt": b"HTTP/1.1 200 OK\r\n\r\nUser-agent: *\nDisallow: /private/\n",
        b"/a.jpg": b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: /private/b.jpg\r\n\r\n",
    }
    with answering(replies, asked=asked) as url:
        found = crawl(near, [url])[0]
    assert (found.status, found.reason, found.attempts) == (Status.FILTERED, Reason.ROBOTS_TXT, 1)
    assert asked == [b"/robots.txt", b"/a.jpg"]


def test_a_body_of_no_announced_length_is_bounded_as_sent(near: FetchConfig) -> None:
    with answering(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + bytes(3_000_000)) as url:
        found = crawl(near.model_copy(update={"robots": False}), [url])[0]
    assert found.reason is Reason.TOO_LARGE
    assert found.detail == "more than 2000000 bytes"


@pytest.mark.parametrize(
    ("status", "attempts"),
    [(429, 3), (500, 3), (507, 3), (508, 3), (523, 3), (599, 3), (501, 1), (505, 1), (510, 1), (408, 1), (999, 1)],
)
def test_a_servers_own_failures_are_tried_again(near: FetchConfig, status: int, attempts: int) -> None:
    with answering(f"HTTP/1.1 {status} No\r\nContent-Length: 0\r\nRetry-After: ²\r\n\r\n".encode()) as url:
        found = crawl(near.model_copy(update={"robots": False}), [url])[0]
    assert (found.reason, found.http_status, found.attempts) == (Reason.HTTP_STATUS, status, attempts)
    assert found.transient == (attempts > 1)


def test_a_retry_may_follow_at_once(near: FetchConfig) -> None:
    at_once = near.model_copy(update={"robots": False, "backoff_s": 0.0})
    with answering(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\nRetry-After: 0\r\n\r\n") as url:
        assert crawl(at_once, [url])[0].attempts == 3


@pytest.mark.parametrize(
    ("record", "transient"),
    [
        (b"", True),  # hangs up in the handshake
        (b"\x16\x03\x03\x10\x00\x02", True),  # in the midst of a record
        (b"\x15\x03\x01\x00\x02\x01\x00", True),  # says so first: close_notify
        (b"\x15\x03\x01\x00\x02\x02\x50", True),  # internal_error
        (b"\x15\x03\x01\x00\x02\x02\x28", False),  # handshake_failure
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", False),
    ],
)
def test_a_handshake_that_breaks_off_may_do_better(near: FetchConfig, record: bytes, transient: bool) -> None:
    for loop in (asyncio.new_event_loop, uvloop.new_event_loop):
        with answering(record, hello=True) as url:
            found = crawl(near.model_copy(update={"robots": False}), [url.replace("http", "https")], loop=loop)[0]
        assert (found.status, found.transient, found.attempts > 1) == (DOWNLOAD, transient, transient), found.detail
        assert found.reason in (Reason.TLS, Reason.CONNECT)


def test_a_flood_of_interim_answers_ends_at_once_and_a_trickle_in_time(near: FetchConfig) -> None:
    interim = b"HTTP/1.1 100 Continue\r\n\r\n"
    patient = near.model_copy(update={"robots": False, "total_s": 60.0, "row_s": 60.0, "retries": 0})
    with answering(interim * 200_000) as url:
        flood = crawl(patient, [url], loop=uvloop.new_event_loop)[0]
    assert (flood.reason, flood.transient) == (Reason.CONNECTION_RESET, False)
    assert "a flood of interim answers" in (flood.detail or "")
    with answering(interim, again_s=0.05) as url:
        trickle = crawl(patient.model_copy(update={"total_s": 1.0}), [url], loop=uvloop.new_event_loop)[0]
    assert trickle.reason is Reason.TIMEOUT
    with answering(interim * 5 + b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nx") as url:
        assert crawl(patient, [url])[0].body == b"x"


def test_a_fault_of_the_crawlers_own_costs_one_row_and_many_in_a_row_break_it(near: FetchConfig) -> None:
    def judge(start: bytes) -> None:
        if start.startswith(b"bad"):
            raise RuntimeError("a fault")

    config = near.model_copy(update={"robots": False})
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 900000\r\nConnection: close\r\n\r\n"
    with answering({b"/a.jpg": head + b"good " * 180_000, b"": head + b"bad! " * 180_000}) as url:
        base = url.removesuffix("/a.jpg")
        good, bad = crawl(config, [url, f"{base}/c.jpg"], judge=judge)
        assert (good.status, good.body) == (Status.SUCCESS, b"good " * 180_000)
        assert (bad.status, bad.reason, bad.transient) == (DOWNLOAD, Reason.CRAWLER_ERROR, True)
        assert (bad.detail or "").startswith("RuntimeError: a fault")
        with pytest.raises(RuntimeError, match="a fault"):
            crawl(config, [f"{base}/{number}.jpg" for number in range(2 * MOST_FAULTS)], judge=judge)


def test_retries_have_a_budget_and_long_retry_after_is_respected(web: SampleWeb, near: FetchConfig) -> None:
    web.reset()
    urls = [f"{web.base_urls[0]}/m/unavailable/a{number}.jpg" for number in range(10)]
    found = crawl(near, urls, retries_left=5)
    assert sum(one.attempts for one in found) == 10 + 5
    web.reset()
    hasty = near.model_copy(update={"retry_after_cap_s": 0.5})
    asked = crawl(hasty, [web.url("too_many_requests")])[0]
    assert (asked.reason, asked.http_status, asked.attempts) == (Reason.HTTP_STATUS, 429, 1)
    web.reset()


def test_requests_at_one_host_stay_in_bounds(web: SampleWeb, near: FetchConfig) -> None:
    web.reset()
    kind = [f"{web.base_urls[0]}/m/wrong_type/{key}.jpg" for key in range(120)]
    crawl(near.model_copy(update={"per_host_in_flight": 6}), kind, workers=2)
    hosts = web.log()["hosts"]
    assert max(host["peak_concurrent"] for host in hosts.values()) <= 3


def test_a_dead_host_is_given_up_after_a_while(near: FetchConfig) -> None:
    changes = {"breaker_failures": 5, "breaker_rest_s": 0.05, "retries": 0, "per_host_in_flight": 1}
    for robots in (False, True):
        config = near.model_copy(update={**changes, "robots": robots})
        found = crawl(config, [f"http://127.0.0.1:9/{number}.jpg" for number in range(30)])
        assert all((one.status, one.reason) == (DOWNLOAD, Reason.CONNECT) for one in found)
        assert sum(one.attempts for one in found) == 5 + config.breaker_rests


def test_without_its_robots_txt_a_host_is_not_asked(web: SampleWeb, near: FetchConfig) -> None:
    web.reset()
    web.pause(0.4)
    patient = near.model_copy(update={"retries": 8, "backoff_s": 0.1})
    private, good = crawl(patient, [web.url("private"), web.url("wrong_type")])
    assert private.reason is Reason.ROBOTS_TXT
    assert good.status is Status.SUCCESS
    web.pause(30)
    found = crawl(near, [web.url("wrong_type")])[0]
    assert (found.status, found.reason) == (DOWNLOAD, Reason.CONNECTION_RESET)
    assert (found.detail or "").startswith("robots.txt: ")
    web.reset()
    assert "wrong_type" not in web.log()["kinds"]


def test_who_is_asking(web: SampleWeb, near: FetchConfig) -> None:
    web.reset()
    crawl(near.model_copy(update={"contact": "https://crawl.example/about"}), [web.url("wrong_type")])
    assert list(web.log()["user_agents"]) == ["Pairmill/0.1 (+https://crawl.example/about)"]


def test_retry_after_in_both_forms() -> None:
    assert retry_after_s("12") == 12.0
    assert retry_after_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert retry_after_s("Fri, 31 Dec 2999 23:59:59 GMT") > 10**9  # type: ignore[operator]
    for hostile in ("²", "Sat, 01 Jan 99999999999999 00:00:00 GMT", "Sat, 01 Jan 2000 00:00:00 +9999999999", "9" * 30):
        assert retry_after_s(hostile) in (None, 1e30)
    assert retry_after_s(None) is retry_after_s("soon") is None


def test_a_bad_certificate_bundle_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "bundle.pem").write_text("nothing")
    for name in ("bundle.pem", "missing.pem"):
        with pytest.raises(UserError, match=r"fetch\.ca_bundle .*" + name):
            tls_context(FetchConfig(ca_bundle=str(tmp_path / name)))
