"""Every misbehaviour of the network, seen over the wire, misbehaves as it is named."""

from __future__ import annotations

import asyncio
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Coroutine
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest

from pairmill.sample_web import misbehaviour, pictures
from pairmill.sample_web.process import SampleWeb

KEY = "noto-1f600"
JPEG = pictures.odd("baseline", KEY).body


async def ask(url: str, **options: Any) -> tuple[int, Any, bytes]:
    timeout = aiohttp.ClientTimeout(total=options.pop("timeout_s", 10))
    async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url, **options) as answer:
        return answer.status, answer, await answer.read()


def get(url: str, **options: Any) -> tuple[int, Any, bytes]:
    return asyncio.run(ask(url, **options))


def raw(url: str, until_bytes: int = 2**20, timeout_s: float = 5) -> bytes:
    """What the server sends, header and all, until it closes or `until_bytes` have come."""
    parts = urlsplit(url)
    assert parts.hostname
    received = b""
    with socket.create_connection((parts.hostname, parts.port), timeout=timeout_s) as connection:
        connection.sendall(f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode())
        while len(received) < until_bytes and (part := connection.recv(65536)):
            received += part
    return received


@pytest.mark.parametrize(("kind", "status"), [("not_found", 404), ("gone", 410), ("unavailable", 503)])
def test_status(web: SampleWeb, kind: str, status: int) -> None:
    assert get(web.url(kind, KEY))[0] == status
    assert get(web.url(kind, KEY))[0] == status


def test_error_once_for_each_url(web: SampleWeb) -> None:
    url = web.url("error_once", KEY)
    assert [get(url)[0] for _ in range(3)] == [500, 200, 200]
    assert get(web.url("error_once", "noto-1f601"))[0] == 500
    web.reset()
    assert get(url)[0] == 500


def test_too_many_requests_until_retry_after_is_over(web: SampleWeb) -> None:
    url = web.url("too_many_requests", KEY)
    status, answer, _ = get(url)
    assert (status, answer.headers["Retry-After"]) == (429, "1")
    assert get(url)[0] == 429
    assert web.log()["too_soon"] == 1
    time.sleep(1)
    assert get(url)[0] == 200


def test_html_and_wrong_type(web: SampleWeb) -> None:
    status, answer, body = get(web.url("html", KEY))
    assert (status, answer.content_type) == (200, "text/html")
    assert body.startswith(b"<!doctype html>")
    status, answer, body = get(web.url("wrong_type", KEY))
    assert (status, answer.content_type, body) == (200, "text/plain", JPEG)


def test_hang_never_answers(web: SampleWeb) -> None:
    with pytest.raises(TimeoutError):
        raw(web.url("hang", KEY), timeout_s=0.5)


def test_drip_gives_one_byte_at_a_time(web: SampleWeb) -> None:
    header = len(raw(web.url("drip", KEY), until_bytes=1))
    received = raw(web.url("drip", KEY), until_bytes=header + 3)
    head, _, body = received.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(JPEG)}".encode() in head
    assert len(body) < 10
    assert JPEG.startswith(body)


def test_cut_short(web: SampleWeb) -> None:
    head, _, body = raw(web.url("cut_short", KEY)).partition(b"\r\n\r\n")
    assert f"Content-Length: {len(JPEG)}".encode() in head
    assert body == JPEG[: len(JPEG) // 2]
    for kind in ("cut_short", "chunks_cut_short"):
        with pytest.raises(aiohttp.ClientPayloadError):
            get(web.url(kind, KEY))


def test_longer_than_announced(web: SampleWeb) -> None:
    head, _, body = raw(web.url("longer_than_announced", KEY)).partition(b"\r\n\r\n")
    assert f"Content-Length: {len(JPEG) // 2}".encode() in head
    assert body == JPEG


def test_never_ending(web: SampleWeb) -> None:
    assert len(raw(web.url("never_ending", KEY), until_bytes=8 * 2**20)) >= 8 * 2**20


def test_gzip_bomb_is_small_on_the_wire(web: SampleWeb) -> None:
    async def unpack() -> tuple[int, int]:
        total = 0
        async with aiohttp.ClientSession() as session, session.get(web.url("gzip_bomb", KEY)) as answer:
            async for part in answer.content.iter_chunked(2**20):
                total += len(part)
            return int(answer.headers["Content-Length"]), total

    sent, unpacked = asyncio.run(unpack())
    assert sent < 2**20
    assert unpacked == 256 * 2**20


def test_reset(web: SampleWeb) -> None:
    with pytest.raises(ConnectionResetError):
        raw(web.url("reset", KEY))


def test_redirects(web: SampleWeb) -> None:
    right = pictures.good(KEY).body
    status, answer, body = get(web.url("redirect", KEY))
    assert (status, body) == (200, right)
    assert [step.status for step in answer.history] == [302]
    status, answer, body = get(web.url("redirect_other_host", KEY))
    assert (status, body) == (200, right)
    if len(web.base_urls) > 1:
        assert str(answer.url).startswith(web.base_urls[1])
    with pytest.raises(aiohttp.TooManyRedirects):
        get(web.url("redirect_loop", KEY))


def test_opt_out_headers(web: SampleWeb) -> None:
    for kind in ("noai", "noimageai"):
        status, answer, body = get(web.url(kind, KEY))
        assert (status, body, answer.headers["X-Robots-Tag"]) == (200, JPEG, kind)


def test_robots_txt_disallows_the_private_folder(web: SampleWeb) -> None:
    assert "Disallow: /private/" in get(web.base_urls[0] + "/robots.txt")[2].decode()
    assert urlsplit(web.url("private", KEY)).path.startswith("/private/")
    assert get(web.url("private", KEY))[0] == 200
    web.set_robots_status(503)
    assert get(web.base_urls[0] + "/robots.txt")[0] == 503


def test_nobody_answers_elsewhere(web: SampleWeb) -> None:
    with pytest.raises(aiohttp.ClientConnectorError):
        get(web.url("refused", KEY))
    with pytest.raises(aiohttp.InvalidURL):
        get(web.url("bad_url", KEY))
    assert urlsplit(web.url("unknown_host", KEY)).hostname == "pictures.invalid"


def test_unknown_pictures_and_kinds_are_404(web: SampleWeb) -> None:
    for path in ("/images/noto-0.jpg", "/m/no_such_kind/noto-1f600.jpg", "/m/noai/noto-0.jpg", "/elsewhere"):
        assert get(web.base_urls[0] + path)[0] == 404
    with pytest.raises(KeyError):
        web.url("no_such_kind")


def test_what_succeeds_ends_with_200_and_needs_a_picture_that_exists(web: SampleWeb) -> None:
    for item in misbehaviour.CATALOGUE:
        if item.succeeds and item.kind not in {"error_once", "too_many_requests"}:
            assert get(web.url(item.kind, KEY))[0] == 200, item.kind
            assert get(web.url(item.kind, "noto-0"), allow_redirects=False)[0] == 404, item.kind


def test_log_counts_requests_and_the_most_at_once(web: SampleWeb) -> None:
    async def together(count: int) -> None:
        calls: list[Coroutine[Any, Any, Any]] = [ask(web.url("hang", KEY), timeout_s=0.7) for _ in range(count)]
        await asyncio.gather(*calls, return_exceptions=True)

    asyncio.run(together(5))
    get(web.url("gone", KEY), headers={"User-Agent": "somebody"})
    log = web.log()
    assert log["kinds"] == {"hang": 5, "gone": 1}
    assert log["paths"][misbehaviour.path("hang", KEY)] == 5
    assert log["requests"] == 6
    assert log["user_agents"]["somebody"] == 1
    assert log["hosts"][urlsplit(web.base_urls[0]).netloc]["peak_concurrent"] == 5
    web.reset()
    assert web.log()["requests"] == 0


def test_pause_resets_connections_until_it_is_over(web: SampleWeb) -> None:
    url = web.base_urls[0] + pictures.good_path(KEY)
    web.pause(60)
    with pytest.raises(ConnectionResetError):
        raw(url)
    web.reset()
    assert get(url)[0] == 200


def test_bad_control_request(web: SampleWeb) -> None:
    request = urllib.request.Request(f"{web.base_urls[0]}/control/pause?seconds=soon", method="POST")
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request, timeout=5)
