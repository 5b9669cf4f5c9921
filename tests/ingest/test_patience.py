"""How long a row waits, for whom, and that what it waits for holds up nobody else."""

from __future__ import annotations

import asyncio
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from ingest import seats
from ingest.config import FetchConfig
from ingest.crawl import Crawler, Errand, Fetched, Visit
from pairmill.sample_web.process import loopback_hosts
from shards.layout import Reason, Status

GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: close\r\n\r\nbody"


class Log:
    """What a server was asked: paths with the moment of each, and the most requests at once."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, str]] = []
        self.now = self.peak = 0
        self.lock = threading.Lock()
        self.over = threading.Event()

    def paths(self) -> Counter[str]:
        return Counter(path for _, path in self.asked)


@contextmanager
def acting(act: Callable[[str, int, Log], bytes | None]) -> Iterator[tuple[int, Log]]:
    """Serve what `act(path, how often it was asked before, log)` returns on all loopback addresses; None hangs up."""
    log = Log()

    class Acting(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            words = self.rfile.readline().split()
            while self.rfile.readline().strip():
                pass
            if len(words) < 2:
                return
            path = words[1].decode()
            with log.lock:
                before = log.paths()[path]
                log.asked.append((time.monotonic(), path))
                log.now += 1
                log.peak = max(log.peak, log.now)
            answer = act(path, before, log)
            with log.lock:
                log.now -= 1
            self.wfile.write(answer or b"")

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, request_queue_size = True, 256

    with Server(("0.0.0.0", 0), Acting) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.server_address[1], log
        finally:
            log.over.set()
            server.shutdown()


def crawl(config: FetchConfig, urls: list[str], workers: int = 1, number: int = 0) -> dict[int, Fetched]:
    """Fetch the URLs as one errand; results in the order in which they came."""

    async def main() -> dict[int, Fetched]:
        crawler = Crawler(config, workers, None, 0, number)
        results: dict[int, Fetched] = {}
        ended = asyncio.Event()

        def deliver(index: int, fetched: Fetched) -> None:
            results[index] = fetched
            if len(results) == len(urls):
                ended.set()

        errand = Errand(deliver, 10_000)
        try:
            for index, url in enumerate(urls):
                crawler.send(Visit(errand, index, url, str(index)))
            async with asyncio.timeout(40):
                waiting = asyncio.create_task(ended.wait())
                await asyncio.wait((waiting, crawler.broken), return_when=asyncio.FIRST_COMPLETED)
                if crawler.broken.done():
                    crawler.broken.result()
        finally:
            await crawler.close()
        return results

    return asyncio.run(main())


def pictures(port: int, count: int, host: str = "127.0.0.1") -> list[str]:
    return [f"http://{host}:{port}/{number}.jpg" for number in range(count)]


def test_rows_that_hang_on_hosts_of_their_own_leave_the_seats_to_others(
    near: FetchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four seats, and six hosts that take the request and say nothing: the good rows are done before them."""
    monkeypatch.setattr(seats, "HANGS_AFTER_S", 0.2)
    *dead, alive = loopback_hosts(7)
    if len(dead) < 6:
        pytest.skip("this system has one loopback address")

    def act(path: str, before: int, log: Log) -> bytes | None:
        return None if path.startswith("/dead") and log.over.wait(30) else GOOD

    config = near.model_copy(update={"robots": False, "concurrency": 4, "retries": 0, "first_byte_s": 4.0})
    with acting(act) as (port, _):
        urls = [f"http://{host}:{port}/dead.jpg" for host in dead] + pictures(port, 30, alive)
        found = crawl(config, urls)
    assert {found[index].reason for index in range(6)} == {Reason.TIMEOUT}
    assert all(found[index].status is Status.SUCCESS for index in range(6, 36))
    assert set(list(found)[:30]) == set(range(6, 36))


def test_requests_that_hang_are_bounded_and_slow_hosts_lose_nothing(
    near: FetchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seats, "HANGS_AFTER_S", 0.1)

    def act(path: str, before: int, log: Log) -> bytes:
        log.over.wait(0.6)
        return GOOD

    with acting(act) as (port, log):
        found = crawl(near.model_copy(update={"robots": False, "concurrency": 3}), pictures(port, 30))
    assert [(one.status, one.attempts) for one in found.values()] == [(Status.SUCCESS, 1)] * 30
    assert 3 < log.peak <= 3 * (1 + seats.MOST_HANGING)
