"""The HTTP server of the sample web.

| path | what |
| --- | --- |
| `/images/KEY.EXT` | a picture as a good web has it |
| `/copies/N/KEY.EXT` | the same bytes under another URL |
| `/resized/VARIANT/KEY.EXT` | the same picture re-encoded and resized |
| `/m/KIND/KEY.EXT` | the picture with a misbehaviour of the catalogue |
| `/private/KEY.EXT` | good pictures that robots.txt disallows |
| `/robots.txt` | disallows `/private/` |
| `/control/...` | `GET log`; `POST reset`, `pause?seconds=N` (resets connections), `robots?status=N` |
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack

from aiohttp import web

from pairmill.sample_web import pictures, wire
from pairmill.sample_web.ledger import Ledger
from pairmill.sample_web.pictures import ImageFile

ROBOTS = "User-agent: *\nDisallow: /private/\n"
HTML = "<!doctype html><html><head><title>Gallery</title></head><body>This picture has moved.</body></html>"
RETRY_AFTER_S = 1
# A client that waits exactly as long as it was told may come a little early by our clock.
CLOCK_SLACK_S = 0.1

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class PortTakenError(Exception):
    """An address that the server should listen on cannot be had; the message is one line."""


class SampleServer:
    """Serves the archive on several addresses. `timescale` multiplies every duration a misbehaviour has."""

    def __init__(self, hosts: Sequence[str], port: int = 0, timescale: float = 1.0) -> None:
        self.hosts = tuple(hosts)
        self.port = port
        self.timescale = timescale
        self.ledger = Ledger()
        self.base_urls: list[str] = []
        self._stack = AsyncExitStack()
        self._paused_until = 0.0
        self._robots_status = 200
        self._visits: dict[tuple[str, str], float] = {}
        self._acts: dict[str, Handler] = {
            "not_found": lambda request: _status(404),
            "gone": lambda request: _status(410),
            "unavailable": lambda request: _status(503),
            "error_once": self._error_once,
            "too_many_requests": self._too_many_requests,
            "html": _html,
            "hang": lambda request: wire.send(request, wire.silence()),
            "drip": self._drip,
            "cut_short": _cut_short,
            "chunks_cut_short": _chunks_cut_short,
            "longer_than_announced": _longer_than_announced,
            "never_ending": _never_ending,
            "gzip_bomb": _gzip_bomb,
            "reset": _reset,
            "redirect": self._redirect,
            "redirect_other_host": self._redirect_other_host,
            "redirect_loop": _redirect_loop,
            "noai": lambda request: _tagged(request, "noai"),
            "noimageai": lambda request: _tagged(request, "noimageai"),
            "wrong_type": _wrong_type,
        }

    async def start(self) -> None:
        """Binds every host; `base_urls` is right afterwards. Raises PortTakenError."""
        await asyncio.to_thread(wire.gzip_bomb)  # takes a while: not while the first client waits
        app = web.Application(middlewares=[self._count])
        app.router.add_get("/robots.txt", self._robots)
        app.router.add_get("/control/log", self._log)
        app.router.add_post("/control/reset", self._clear)
        app.router.add_post("/control/pause", self._pause)
        app.router.add_post("/control/robots", self._set_robots)
        app.router.add_get("/m/{kind}/{key}.{extension}", self._misbehave)
        app.router.add_get("/resized/{variant}/{key}.{extension}", _resized)
        app.router.add_get("/images/{key}.{extension}", _good)
        app.router.add_get("/copies/{number}/{key}.{extension}", _good)
        app.router.add_get("/private/{key}.{extension}", _private)
        # Without cancellation a hanging answer would outlive its client.
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.5)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        for host in self.hosts:
            self.base_urls.append(await _listen(runner, host, self.port))

    async def stop(self) -> None:
        """Closes every address and connection."""
        await self._stack.aclose()

    @web.middleware
    async def _count(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path.startswith("/control/"):
            return await handler(request)
        kind = request.match_info.get("kind") or request.path.split("/")[1]
        with self.ledger.request(request.host, request.path, kind, request.headers.get("User-Agent", "")):
            if time.monotonic() < self._paused_until:
                return wire.reset(request)
            return await handler(request)

    async def _misbehave(self, request: web.Request) -> web.StreamResponse:
        kind, key = request.match_info["kind"], request.match_info["key"]
        if kind in self._acts:
            return await self._acts[kind](request)
        try:
            return _respond(pictures.odd(kind, key))
        except KeyError:
            raise web.HTTPNotFound(text="no such picture or kind\n") from None

    async def _error_once(self, request: web.Request) -> web.StreamResponse:
        return _respond(_picture(request)) if self._seen_before(request) else await _status(500)

    async def _too_many_requests(self, request: web.Request) -> web.StreamResponse:
        wait_s = max(1, math.ceil(RETRY_AFTER_S * self.timescale))
        first = self._seen_before(request)
        if first and time.monotonic() >= first + wait_s - CLOCK_SLACK_S:
            return _respond(_picture(request))
        self.ledger.too_soon += bool(first)
        return web.Response(status=429, headers={"Retry-After": str(wait_s)})

    def _seen_before(self, request: web.Request) -> float:
        """When this client first asked for this URL (monotonic seconds), 0 if it does so now."""
        visit = (request.remote or "", request.host + request.path)
        first = self._visits.get(visit, 0.0)
        self._visits.setdefault(visit, time.monotonic())
        return first

    async def _drip(self, request: web.Request) -> web.StreamResponse:
        picture = _picture(request)
        first = wire.head(_described(picture))
        return await wire.send(request, wire.dripping(first, picture.body, self.timescale))

    async def _redirect(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=302, headers={"Location": _good_path(request)})

    async def _redirect_other_host(self, request: web.Request) -> web.StreamResponse:
        own = self.base_urls.index(f"http://{request.host}") if f"http://{request.host}" in self.base_urls else 0
        target = self.base_urls[(own + 1) % len(self.base_urls)] + _good_path(request)
        return web.Response(status=301, headers={"Location": target})

    async def _robots(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=self._robots_status, text=ROBOTS if self._robots_status == 200 else "")

    async def _log(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(self.ledger.as_json())

    async def _clear(self, request: web.Request) -> web.StreamResponse:
        self.ledger.clear()
        self._visits.clear()
        self._paused_until = 0.0
        self._robots_status = 200
        return web.json_response({"reset": True})

    async def _pause(self, request: web.Request) -> web.StreamResponse:
        self._paused_until = time.monotonic() + _number(request, "seconds")
        return web.json_response({"paused": True})

    async def _set_robots(self, request: web.Request) -> web.StreamResponse:
        self._robots_status = int(_number(request, "status"))
        return web.json_response({"robots": self._robots_status})


async def _listen(runner: web.AppRunner, host: str, port: int) -> str:
    """Binds one address; returns its base URL."""
    site = web.TCPSite(runner, host, port, backlog=1024)
    try:
        await site.start()
    except OSError as error:
        raise PortTakenError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    chosen = runner.addresses[-1][1]
    return f"http://{host}:{chosen}"


def _number(request: web.Request, name: str) -> float:
    """The number in the query under this name. Raises HTTPBadRequest."""
    try:
        return float(request.query[name])
    except (KeyError, ValueError):
        raise web.HTTPBadRequest(text=f"give a number: {request.path}?{name}=N\n") from None


def _picture(request: web.Request) -> ImageFile:
    """The picture that the path names as a plain JPEG, which the misbehaviours bend. Raises HTTPNotFound."""
    try:
        return pictures.odd("baseline", request.match_info["key"])
    except KeyError:
        raise web.HTTPNotFound(text="no such picture\n") from None


def _good_path(request: web.Request) -> str:
    """The path on the good web of the picture that the path names. Raises HTTPNotFound."""
    try:
        return pictures.good_path(request.match_info["key"])
    except KeyError:
        raise web.HTTPNotFound(text="no such picture\n") from None


def _described(picture: ImageFile) -> dict[str, str]:
    return {"Content-Type": picture.content_type, "Content-Length": str(len(picture.body))}


def _respond(picture: ImageFile) -> web.Response:
    return web.Response(body=picture.body, headers={"Content-Type": picture.content_type})


async def _good(request: web.Request) -> web.StreamResponse:
    try:
        return _respond(pictures.good(request.match_info["key"]))
    except KeyError:
        raise web.HTTPNotFound(text="no such picture\n") from None


async def _private(request: web.Request) -> web.StreamResponse:
    return _respond(_picture(request))


async def _resized(request: web.Request) -> web.StreamResponse:
    try:
        return _respond(pictures.variant(request.match_info["key"], request.match_info["variant"]))
    except KeyError:
        raise web.HTTPNotFound(text="no such picture or variant\n") from None


async def _status(status: int) -> web.StreamResponse:
    return web.Response(status=status, text=f"status {status}\n")


async def _html(request: web.Request) -> web.StreamResponse:
    return web.Response(text=HTML, content_type="text/html")


async def _cut_short(request: web.Request) -> web.StreamResponse:
    picture = _picture(request)
    return await wire.send(request, wire.once(wire.head(_described(picture)), picture.body[: len(picture.body) // 2]))


async def _chunks_cut_short(request: web.Request) -> web.StreamResponse:
    picture = _picture(request)
    first = wire.head({"Content-Type": picture.content_type, "Transfer-Encoding": "chunked"})
    return await wire.send(request, wire.once(first, wire.chunk(picture.body[: len(picture.body) // 2])))


async def _longer_than_announced(request: web.Request) -> web.StreamResponse:
    picture = _picture(request)
    announced = {**_described(picture), "Content-Length": str(len(picture.body) // 2)}
    # In one piece: what a client makes of it shall not depend on how the pieces arrive.
    return await wire.send(request, wire.once(wire.head(announced) + picture.body))


async def _never_ending(request: web.Request) -> web.StreamResponse:
    picture = _picture(request)
    first = wire.head({"Content-Type": picture.content_type}) + picture.body
    return await wire.send(request, wire.never_ending(first))


async def _gzip_bomb(request: web.Request) -> web.StreamResponse:
    bomb = await asyncio.to_thread(wire.gzip_bomb)
    return web.Response(body=bomb, headers={"Content-Type": "image/jpeg", "Content-Encoding": "gzip"})


async def _reset(request: web.Request) -> web.StreamResponse:
    return wire.reset(request)


async def _redirect_loop(request: web.Request) -> web.StreamResponse:
    return web.Response(status=302, headers={"Location": request.path})


async def _tagged(request: web.Request, wish: str) -> web.StreamResponse:
    response = _respond(_picture(request))
    response.headers["X-Robots-Tag"] = wish
    return response


async def _wrong_type(request: web.Request) -> web.StreamResponse:
    return web.Response(body=_picture(request).body, headers={"Content-Type": "text/plain"})
