"""A row's way to its body: robots.txt, redirects, retries, each step in its host's turn."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from infra import metrics
from infra.logs import log
from ingest.config import FetchConfig
from ingest.consent import KEEP_S, Robots
from ingest.fetch import Body, Fetcher, Judge, Miss, Redirect, RobotsUnreachableError
from ingest.politeness import Host, HostQueues
from ingest.seats import Seat, Seats
from ingest.urls import as_sent, host_of
from shards.layout import Reason, Status

MOST_FAULTS = 100
"""Rows in a row that may fail by a fault of the crawler's own before it counts as broken."""


@dataclass(slots=True)
class Fetched:
    """What became of one URL: a body, or why there is none."""

    body: bytes | None = None
    status: Status = Status.SUCCESS
    reason: Reason = Reason.NONE
    detail: str | None = None
    http_status: int | None = None
    final_url: str | None = None
    content_type: str | None = None
    attempts: int = 0
    transient: bool = False
    opt_out: str | None = None
    still_encoded: str | None = None  # the Content-Encoding of a body that was not unpacked
    original_width: int | None = None
    original_height: int | None = None
    seconds: float = 0.0


@dataclass(slots=True)
class Errand:
    """The rows of one shard to the crawler: who gets the results, and what they may cost."""

    deliver: Callable[[int, Fetched], None]
    retries_left: int
    abandoned: bool = False
    open: dict[int, Visit] = field(default_factory=dict)

    def cut(self, why: str) -> None:
        """End all rows that are still under way, as `not_attempted`; what comes of them later is ignored."""
        for visit in list(self.open.values()):
            cut = Fetched(None, Status.FAILED_TO_DOWNLOAD, Reason.NOT_ATTEMPTED, why, transient=True)
            cut.attempts = visit.attempts
            self.end(visit, cut)
        self.abandoned = True

    def end(self, visit: Visit, fetched: Fetched) -> None:
        """Deliver what became of a row; of a row that has ended already, nothing."""
        if self.open.pop(visit.index, None) is not None:
            self.deliver(visit.index, fetched)


@dataclass(slots=True)
class Visit:
    """One URL on its way. `index` is the row's place in its shard."""

    errand: Errand
    index: int
    url: str
    name: str  # seeds the jitter
    attempts: int = 0  # requests sent for it; those of its redirects belong to one
    tries: int = 1  # those of them that its host's rests do not excuse
    seen: list[str] = field(default_factory=list)
    is_moved: bool = False  # by a redirect that has not been followed yet
    is_answered: bool = False  # by its own URL, the last time
    started: float = 0.0
    missed: Miss | None = None  # what the last attempt came to
    missed_at: float = 0.0  # when its host could not be reached for it, the last time; in loop time

    def begin(self) -> None:
        """Count an attempt, unless it goes on with one after a redirect."""
        self.attempts += not self.is_moved
        self.is_moved = self.is_answered = False


class Crawler:
    """Keeps `concurrency` requests going over all shards in hand. Make it inside a running loop.

    `room` is the brake: while it is cleared no new request is sent.
    """

    def __init__(
        self, config: FetchConfig, workers: int, judge: Judge | None, judge_bytes: int, number: int = 0
    ) -> None:
        self._config = config
        self._fetcher = Fetcher(config, judge, judge_bytes)
        self._queues: HostQueues[Visit] = HostQueues(config, workers, number)
        self._robots = Robots()
        self.room = asyncio.Event()
        self.room.set()
        self.in_flight = 0
        self._faults = 0
        loop = asyncio.get_running_loop()
        self.broken: asyncio.Future[None] = loop.create_future()
        self._seats = Seats(config.concurrency, self._work, self._failed)

    def send(self, visit: Visit) -> None:
        """Put a URL in its host's queue; its errand gets the result, in any order."""
        if not visit.seen:
            visit.errand.open[visit.index] = visit
        sent = as_sent(visit.url)
        host = host_of(sent) if sent is not None else None
        if sent is None or host is None:
            self._finish(visit, Fetched(None, Status.FAILED_TO_DOWNLOAD, Reason.BAD_URL, "not an http URL"))
        else:
            visit.url = sent
            self._put(host, visit)

    @property
    def throttled(self) -> int:
        """How many hosts have rows that wait for their turn."""
        return self._queues.throttled()

    async def close(self) -> None:
        """Drop what is under way and close all connections."""
        await self._seats.close()
        await self._fetcher.close()

    def _failed(self, error: BaseException) -> None:
        if not self.broken.done():
            self.broken.set_exception(error)

    async def _work(self, seat: Seat) -> None:
        while not seat.is_lent:
            await self.room.wait()
            host, visit = await self._queues.take()
            self.in_flight += 1
            seat.waits()
            try:
                if not visit.errand.abandoned:
                    await self._visit(host, visit, seat)
                    self._faults = 0
            except Exception as error:
                if not self._ended_by(host, visit, error):
                    raise
            finally:
                seat.answered()
                self.in_flight -= 1
                self._queues.done(host)

    def _ended_by(self, host: Host[Visit], visit: Visit, error: Exception) -> bool:
        """End a row that the crawler failed on: a fault of its own, which one hostile answer may have found.

        False when it is no row's: what became of this one could not be delivered, or none of many others ended well.
        """
        self._faults += 1
        log.error("ingest: row %s at %s: a fault of the crawler's own", visit.name, host.name, exc_info=error)
        is_delivered = visit.index not in visit.errand.open and not visit.errand.abandoned
        if is_delivered or self._faults > MOST_FAULTS:
            return False
        detail = f"{type(error).__name__}: {error}"[:200]
        fault = Fetched(None, Status.FAILED_TO_DOWNLOAD, Reason.CRAWLER_ERROR, detail, transient=True)
        self._finish(visit, fault)
        return True

    async def _visit(self, host: Host[Visit], visit: Visit, seat: Seat) -> None:
        if not visit.started:
            visit.started = time.monotonic()
        lost = self._queues.given_up(host)
        if lost is not None:
            reason, detail = lost
            failed = Status.FAILED_TO_DOWNLOAD
            given_up = Fetched(None, failed, Reason(reason), f"host given up after: {detail}", transient=True)
            self._finish(visit, given_up)
            return
        if visit.missed is not None and host.failures and self._left_s(visit) <= 0:
            self._end_late(visit)
            return
        if self._config.robots and not await self._may_ask(host, visit):
            return
        visit.begin()
        answer = await self._fetcher.ask(visit.url, seat.answered)
        why = str(answer.reason) if isinstance(answer, Miss) else ""
        metrics.requests().inc(1, tags={"outcome": type(answer).__name__.lower(), "reason": why})
        visit.is_answered = answer.http_status is not None
        if isinstance(answer, Body):
            self._queues.reached(host)
            self._finish(
                visit,
                Fetched(
                    answer.data,
                    http_status=answer.http_status,
                    content_type=answer.content_type,
                    still_encoded=answer.still_encoded,
                ),
            )
        elif isinstance(answer, Redirect):
            self._queues.reached(host)
            self._follow(visit, answer)
        else:
            self._missed(host, visit, answer)

    async def _may_ask(self, host: Host[Visit], visit: Visit) -> bool:
        """Tell whether robots.txt lets the row be asked for now; if not, the row has ended or is to wait."""
        agent, known_s = self._config.agent_token, host.delay_s
        try:
            rules = await self._robots.rules(visit.url, self._fetcher.ask_robots)
        except RobotsUnreachableError as error:
            visit.begin()
            miss = replace(error.miss, detail=f"robots.txt: {error.miss.detail}")
            self._hold(host, miss)
            self._missed(host, visit, miss)
            return False
        barred = rules.barred(visit.url, agent)
        if barred is not None:
            self._finish(visit, Fetched(None, Status.FILTERED, Reason.ROBOTS_TXT, barred, opt_out=barred))
            return False
        may_go = self._queues.slow_down(host, rules.delay_s(agent), known_s)
        if not may_go:
            self._queues.put(host.name, visit)
        self._leave_late(host.name)
        return may_go

    def _hold(self, host: Host[Visit], miss: Miss) -> None:
        """Let nobody ask a host for its robots.txt again at once, nor at all while it asks for a long patience."""
        wait_s = max(self._config.backoff_s, miss.retry_after_s or 0.0)
        if wait_s > max(self._config.backoff_s, self._config.retry_after_cap_s):
            self._queues.leave(host, min(wait_s, KEEP_S), miss.reason, miss.detail)
        else:
            self._queues.pause(host, wait_s, "robots_txt")

    def _put(self, host: str, visit: Visit) -> None:
        self._queues.put(host, visit)
        self._leave_late(host)

    def _leave_late(self, host: str) -> None:
        """End the rows for which a host's Crawl-delay leaves no time."""
        for visit in self._queues.late(host, self._config.row_s):
            self._end_late(visit)

    def _follow(self, visit: Visit, redirect: Redirect) -> None:
        """Send the row on; the new address waits its turn at its own host and is checked like any other."""
        visit.seen.append(visit.url)
        if redirect.url in visit.seen or len(visit.seen) > self._config.max_redirects:
            detail = f"{len(visit.seen)} redirects, the last to {redirect.url}"[:200]
            failed = Fetched(None, Status.FAILED_TO_DOWNLOAD, Reason.TOO_MANY_REDIRECTS, detail)
            failed.http_status = redirect.http_status
            self._finish(visit, failed)
            return
        visit.url, visit.is_moved = redirect.url, True
        self.send(visit)

    def _missed(self, host: Host[Visit], visit: Visit, miss: Miss) -> None:
        visit.missed, missed_at = miss, 0.0
        if miss.reached:
            self._queues.reached(host)
        else:
            self._queues.missed(host, visit.name, miss.reason, miss.detail)
            missed_at, visit.missed_at = visit.missed_at, asyncio.get_running_loop().time()
        left_s = self._left_s(visit)
        is_away = not miss.reached and self._queues.is_away(host)
        pause = None if is_away else self._pause_s(host, visit, miss)
        if pause is not None:
            if miss.http_status in (429, 503):
                self._queues.pause(host, pause, "retry_after")
            if max(pause, self._queues.wait_s(host)) > left_s:
                self._end_late(visit)
                return
            if miss.reached or not host.has_answered:
                visit.errand.retries_left -= 1  # a host that went away is the breaker's affair, not the shard's
            visit.tries += 1
            self._queues.put(host.name, visit, pause)
            return
        if not is_away and miss.transient and missed_at and left_s > 0:
            is_away = self._queues.rests_instead(host, missed_at)
        if not is_away:
            self._end(visit, miss)
        elif self._queues.wait_s(host) > left_s:
            self._end_late(visit)
        else:
            self._put(host.name, visit)  # it costs no try: the host is at fault, and its rests are counted

    def _pause_s(self, host: Host[Visit], visit: Visit, miss: Miss) -> float | None:
        """Return how long to wait before the next try, in seconds; None when there is none.

        A host that hangs and never answered gets one more try: most are dead, and would hold the shard's end.
        """
        config = self._config
        hangs = miss.reason == Reason.TIMEOUT and not host.has_answered
        retries = min(1, config.retries) if hangs else config.retries
        if not miss.transient or visit.tries > retries or visit.errand.retries_left <= 0:
            return None
        if miss.retry_after_s is not None and miss.retry_after_s > config.retry_after_cap_s:
            return None
        backoff = min(config.backoff_cap_s, config.backoff_s * 2 ** (visit.tries - 1))
        jitter = random.Random(f"{config.seed}/{visit.name}/{visit.tries}").uniform(0.5, 1.5)
        return max(miss.retry_after_s or 0.0, backoff * jitter)

    def _left_s(self, visit: Visit) -> float:
        """Return what is left of a row's time, in seconds."""
        return visit.started + self._config.row_s - time.monotonic()

    def _end_late(self, visit: Visit) -> None:
        """End a row that has had all its time, or would have to wait for longer than that."""
        over = f"no time left of row_s, {self._config.row_s:g} s"
        if visit.missed is None:
            why = f"{over}, before its turn at a host with a Crawl-delay"
            waits = Fetched(None, Status.FAILED_TO_DOWNLOAD, Reason.NOT_ATTEMPTED, why, transient=True)
            self._finish(visit, waits)
        else:
            self._end(visit, replace(visit.missed, detail=f"{visit.missed.detail}; {over}", transient=True))

    def _end(self, visit: Visit, miss: Miss) -> None:
        refusal = miss.refusal
        self._finish(
            visit,
            Fetched(
                None, miss.status, miss.reason, miss.detail, miss.http_status,
                content_type=miss.content_type, transient=miss.transient, opt_out=miss.opt_out,
                original_width=refusal.original_width if refusal else None,
                original_height=refusal.original_height if refusal else None,
            ),
        )  # fmt: skip

    def _finish(self, visit: Visit, fetched: Fetched) -> None:
        if visit.is_answered or visit.seen:
            fetched.final_url = visit.url
        fetched.attempts = visit.attempts
        fetched.seconds = time.monotonic() - visit.started if visit.started else 0.0
        visit.errand.end(visit, fetched)
