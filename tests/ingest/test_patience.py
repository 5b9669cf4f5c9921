"""How long a row waits, for whom, and that what it waits for holds up nobody else."""

from __future__ import annotations

import asyncio
import itertools
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from ingest import consent, seats
from ingest.config import FetchConfig
from ingest.crawl import Crawler, Errand, Fetched, Visit
from pairmill.sample_web.process import loopback_hosts
from shards.layout import Reason, Status

DOWNLOAD = Status.FAILED_TO_DOWNLOAD
GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: close\r\n\r\nbody"
ABSENT = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
BUSY = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


def text(body: str) -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()


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


def test_a_robots_txt_that_fails_once_costs_a_try_and_no_row(near: FetchConfig) -> None:
    def act(path: str, before: int, log: Log) -> bytes:
        return (ABSENT if before else BUSY) if path == "/robots.txt" else GOOD

    with acting(act) as (port, log):
        found = crawl(near, pictures(port, 6))
    assert [one.status for one in found.values()] == [Status.SUCCESS] * 6
    assert log.paths()["/robots.txt"] == 2


@pytest.mark.parametrize("status", [429, 500, 501, 503])
def test_where_robots_txt_fails_nothing_is_fetched_and_the_rows_may_be_tried_again(
    near: FetchConfig, status: int
) -> None:
    with acting(lambda path, *_: BUSY.replace(b"503", str(status).encode())) as (port, log):
        found = crawl(near, pictures(port, 12))
    for one in found.values():
        assert (one.status, one.reason, one.transient) == (DOWNLOAD, Reason.HTTP_STATUS, True)
        assert f"robots.txt: HTTP {status}" in (one.detail or "")
        assert one.final_url is None
    assert set(log.paths()) == {"/robots.txt"}
    assert log.paths()["/robots.txt"] <= sum(one.attempts for one in found.values()) / 2, "they ask it together"


def test_a_host_that_asks_for_a_long_patience_is_left_alone(near: FetchConfig) -> None:
    later = BUSY.replace(b"Content-Length", b"Retry-After: 3600\r\nContent-Length")
    with acting(lambda *_: later) as (port, log):
        found = crawl(near.model_copy(update={"per_host_in_flight": 1}), pictures(port, 5))
    assert [(one.reason, one.transient) for one in found.values()] == [(Reason.HTTP_STATUS, True)] * 5
    assert sorted(one.attempts for one in found.values()) == [0, 0, 0, 0, 1]
    assert log.paths() == {"/robots.txt": 1}


def test_a_robots_txt_is_asked_for_again_when_it_is_old(near: FetchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consent, "KEEP_S", 0.3)

    def act(path: str, before: int, log: Log) -> bytes:
        return text("User-agent: *\nDisallow: /\n" if before else "") if path == "/robots.txt" else GOOD

    with acting(act) as (port, _):
        found = crawl(near.model_copy(update={"per_host_per_s": 2.0}), pictures(port, 2))
    assert [found[0].reason, found[1].reason] == [Reason.NONE, Reason.ROBOTS_TXT]


def test_a_row_has_its_time_over_all_its_tries(near: FetchConfig) -> None:
    stubborn = near.model_copy(update={"robots": False, "retries": 10_000, "row_s": 1.0})
    with acting(lambda *_: BUSY) as (port, log):
        found = crawl(stubborn, pictures(port, 3))
    for one in found.values():
        assert (one.reason, one.http_status, one.transient) == (Reason.HTTP_STATUS, 503, True)
        assert "no time left of row_s, 1 s" in (one.detail or "")
    assert sum(one.attempts for one in found.values()) == len(log.asked)


@pytest.mark.parametrize(("rests", "row_s"), [(2, 30.0), (10_000, 1.5)])
def test_a_row_has_its_time_over_all_rests_of_its_host_and_each_probe_is_counted(
    near: FetchConfig, rests: int, row_s: float
) -> None:
    """One row is answered, and four others hang, too few for their host to be given up."""

    def act(path: str, before: int, log: Log) -> bytes | None:
        if path == "/0.jpg":
            return GOOD
        log.over.wait(30)
        return None

    changes = {"robots": False, "retries": 1, "breaker_rest_s": 0.1, "first_byte_s": 0.3}
    config = near.model_copy(update={**changes, "breaker_rests": rests, "row_s": row_s})
    with acting(act) as (port, log):
        found = crawl(config, pictures(port, 5))
    assert found.pop(0).status is Status.SUCCESS
    for one in found.values():
        assert (one.reason, one.transient) == (Reason.TIMEOUT, True)
        assert ("row_s" in (one.detail or "")) == (rests > 2)
    assert sum(one.attempts for one in found.values()) == len(log.asked) - 1 > 4 * 2


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


def test_a_crawl_delay_is_kept_to_from_the_first_row_on_and_holds_no_shard(near: FetchConfig) -> None:
    """All rows wait for robots.txt together; then one goes, two more have the time to, and three are left."""

    def act(path: str, before: int, log: Log) -> bytes:
        return text("User-agent: *\nCrawl-delay: 0.6\n") if path == "/robots.txt" else GOOD

    with acting(act) as (port, log):
        found = crawl(near.model_copy(update={"row_s": 1.5}), pictures(port, 6))
    assert Counter(one.status for one in found.values()) == {Status.SUCCESS: 3, DOWNLOAD: 3}
    left = [one for one in found.values() if one.status is DOWNLOAD]
    assert all((one.reason, one.transient, one.attempts) == (Reason.NOT_ATTEMPTED, True, 0) for one in left)
    asked = [at for at, path in log.asked if path != "/robots.txt"]
    assert len(asked) == 3
    assert all(later - sooner > 0.5 for sooner, later in itertools.pairwise(asked))


def test_a_crawl_delay_is_kept_to_by_all_workers_together(near: FetchConfig) -> None:
    """The second of three workers leaves the first place to the first one, and asks every third time."""

    def act(path: str, before: int, log: Log) -> bytes:
        return text("User-agent: *\nCrawl-delay: 0.3\n") if path == "/robots.txt" else GOOD

    with acting(act) as (port, log):
        found = crawl(near, pictures(port, 2), workers=3, number=1)
    assert [one.status for one in found.values()] == [Status.SUCCESS] * 2
    told, first, second = (at for at, _ in log.asked)
    assert first - told > 0.25
    assert second - first > 0.8
