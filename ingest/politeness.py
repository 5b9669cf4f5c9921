"""Who may be asked now: rows wait in a queue a host, each with its bound on requests in flight and its pace."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
import zlib
from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from infra import metrics
from ingest.config import FetchConfig
from shards.layout import Reason

ItemT = TypeVar("ItemT")
MAX_IDLE_HOSTS = 20_000
GIVEN_UP_RESTS = 20
"""How many first rests long a host is given up before it is tried again."""
STRANGER_SHARE = 4
"""A host that hangs and never answered is given up after this part of `breaker_failures`, without a rest."""
FEW_ROWS = 5
"""Fewer rows than these that fail one after another end without their host being given up."""
TURN_S = 2.0
"""How long a worker's turn at a host lasts, where they have to take turns; most requests end within it."""
TICK_S = 0.002
"""Times closer than this are the same; event loops ring by the millisecond."""


@dataclass
class Host(Generic[ItemT]):
    """One host: what waits for it, what is under way, and when it may be asked next (loop time, seconds)."""

    name: str
    waiting: deque[ItemT] = field(default_factory=deque)
    in_flight: int = 0
    next_at: float = 0.0
    delay_s: float = 0.0
    answered_at: float = float("-inf")
    failures: int = 0  # to reach it, in a row
    failed_rows: set[str] = field(default_factory=set)  # in that row of failures, no more than a few
    rests: int = 0
    resting_until: float = 0.0
    given_up_until: float = 0.0
    last_failure: tuple[str, str] = ("", "")
    listed: bool = False  # in the ready queue, or with a timer set

    @property
    def has_answered(self) -> bool:
        """Whether it ever did."""
        return self.answered_at > float("-inf")


def _is_idle(host: Host[ItemT]) -> bool:
    return not host.waiting and not host.in_flight and not host.listed


class HostQueues(Generic[ItemT]):
    """Hands out waiting items such that no host gets more than its share of a worker.

    The bounds of the configuration hold for the whole run: a worker that is one of `workers` takes its part of
    them. That needs no word between workers; a host whose rows lie with few of them is asked more slowly than
    it would bear, never faster. With more workers than a host may have requests in flight, they take turns at
    it, by the clock: each may begin one request in its turn of `TURN_S`, and in no other.
    """

    def __init__(self, config: FetchConfig, workers: int = 1, number: int = 0) -> None:
        """`number` is this worker's among the `workers`, from 0."""
        self._config = config
        self._limit = max(1, config.per_host_in_flight // workers)
        self._turns, self._number = -(-workers // config.per_host_in_flight), number
        self._pace_s = workers / config.per_host_per_s if config.per_host_per_s else 0.0
        self._workers = workers
        self._hosts: dict[str, Host[ItemT]] = {}
        self._ready: deque[Host[ItemT]] = deque()
        self._timers: list[tuple[float, int, str, ItemT | None]] = []
        self._takers: deque[asyncio.Future[tuple[Host[ItemT], ItemT]]] = deque()
        self._ticket = itertools.count()
        self._alarm: asyncio.Handle | None = None
        # Kept here: uvloop gives a handle without `when` for a moment that has passed.
        self._alarm_at = 0.0
        self._loop = asyncio.get_running_loop()

    def put(self, host: str, item: ItemT, delay_s: float = 0.0) -> None:
        """Add an item to a host's queue, `delay_s` seconds from now."""
        if delay_s > 0:
            heapq.heappush(self._timers, (self._loop.time() + delay_s, next(self._ticket), host, item))
            self._set_alarm()
            return
        entry = self._hosts.get(host)
        if entry is None:
            entry = self._hosts[host] = Host(host)
        entry.waiting.append(item)
        self._list(entry)
        self._serve()

    async def take(self) -> tuple[Host[ItemT], ItemT]:
        """Wait for an item whose host may be asked now; `done` must follow."""
        taker: asyncio.Future[tuple[Host[ItemT], ItemT]] = self._loop.create_future()
        self._takers.append(taker)
        self._serve()
        return await taker

    def done(self, host: Host[ItemT]) -> None:
        """Say that the request for an item taken has ended."""
        host.in_flight -= 1
        self._list(host)
        self._serve()
        if len(self._hosts) > MAX_IDLE_HOSTS and not host.failures and _is_idle(host):
            self._hosts.pop(host.name, None)
        elif len(self._hosts) > 2 * MAX_IDLE_HOSTS:
            self._forget_idle_hosts()

    def throttled(self) -> int:
        """Return how many hosts have items waiting that may not be handed out now. From any thread."""
        return sum(1 for host in list(self._hosts.values()) if host.waiting)

    def pause(self, host: Host[ItemT], seconds: float, why: str) -> None:
        """Ask this host nothing for a while; `why` is `rest`, `retry_after` or `robots_txt`."""
        tags = {"host": metrics.host_label(host.name), "reason": why}
        metrics.host_paused_seconds().inc(seconds, tags=tags)
        host.next_at = max(host.next_at, self._loop.time() + seconds)

    def leave(self, host: Host[ItemT], seconds: float, reason: str, detail: str) -> None:
        """Give a host up for a while: its rows end as (reason, detail)."""
        host.last_failure = (reason, detail)
        host.given_up_until = max(host.given_up_until, self._loop.time() + seconds)

    def slow_down(self, host: Host[ItemT], delay_s: float, known_s: float) -> bool:
        """Keep to the host's Crawl-delay, as far as the configuration lets it; tell whether a request may go now.

        `known_s` is the host's delay as it was when the request's item was taken. Of those taken before a longer
        one was known a single one may go, in the first of the workers; the others begin after it, in their order.
        """
        delay_s = min(delay_s, self._config.crawl_delay_cap_s)
        if delay_s * self._workers <= host.delay_s:
            return host.delay_s <= known_s
        host.delay_s = delay_s * self._workers
        behind_s = self._number * delay_s
        host.next_at = max(host.next_at, self._loop.time() + (behind_s or host.delay_s))
        return not behind_s

    def wait_s(self, host: Host[ItemT]) -> float:
        """Return how long this host is asked nothing from now on, in seconds."""
        return max(0.0, host.next_at - self._loop.time())

    def late(self, name: str, most_s: float) -> list[ItemT]:
        """Take back the items that a host's Crawl-delay would keep waiting for more than `most_s` seconds."""
        host = self._hosts.get(name)
        if host is None or not host.delay_s:
            return []
        left_s = most_s - self.wait_s(host)
        in_time = 1 + int(left_s / host.delay_s) if left_s >= 0 else 0
        return [host.waiting.pop() for _ in range(len(host.waiting) - in_time)]

    def reached(self, host: Host[ItemT]) -> None:
        """Note that the host answered."""
        host.failures = host.rests = 0
        host.failed_rows.clear()
        host.answered_at = self._loop.time()

    def missed(self, host: Host[ItemT], row: str, reason: str, detail: str) -> None:
        """Note that the host could not be reached.

        After too many times in a row it rests, its rows with it, and is then tried by one request at a time;
        each rest is twice as long as the one before. After too many it is given up for a while, and its rows end
        as the last of them did. A host that hangs and never answered is given up at once, and sooner: each try
        would take all the time that a request may.
        """
        host.failures += 1
        if len(host.failed_rows) < FEW_ROWS:
            host.failed_rows.add(row)
        host.last_failure = (reason, detail)
        hangs = reason == Reason.TIMEOUT and not host.has_answered
        patience = self._config.breaker_failures
        was_probe = 0 < host.rests <= self._config.breaker_rests
        if was_probe or host.failures >= (-(-patience // STRANGER_SHARE) if hangs else patience):
            self._rest(host, is_last=hangs)

    def rests_instead(self, host: Host[ItemT], since: float) -> bool:
        """Let the host rest when a row runs out of tries, if it may be away; tell whether it does.

        It may be if it answered before, and nobody since the row's try before the last (`since`, loop time). Where
        others are answered in between, the failure is that row's affair.
        """
        if not host.has_answered or host.answered_at >= since:
            return False
        self._rest(host)
        return self.is_away(host)

    def _rest(self, host: Host[ItemT], *, is_last: bool = False) -> None:
        now = self._loop.time()
        if now < host.resting_until:
            return
        host.rests += 1
        if host.rests > self._config.breaker_rests and not is_last and len(host.failed_rows) < FEW_ROWS:
            return  # so few rows may be at fault themselves: they end, and the host goes on
        if is_last or host.rests > self._config.breaker_rests:
            host.given_up_until = now + GIVEN_UP_RESTS * self._config.breaker_rest_s
        else:
            rest_s = self._config.breaker_rest_s * 2 ** (host.rests - 1)
            host.resting_until = now + rest_s
            self.pause(host, rest_s, "rest")

    def is_away(self, host: Host[ItemT]) -> bool:
        """Tell whether a host that has answered before is at rest, or being tried after a rest."""
        return host.has_answered and 0 < host.rests <= self._config.breaker_rests and self.given_up(host) is None

    def given_up(self, host: Host[ItemT]) -> tuple[str, str] | None:
        """Return why a host is not asked at all at present, as (reason, detail); None if it is."""
        return host.last_failure if self._loop.time() < host.given_up_until else None

    def _forget_idle_hosts(self) -> None:
        """Drop what is known of idle hosts: first of those at no rest, then, if most remain, of all."""
        now = self._loop.time()
        idle = [host for host in self._hosts.values() if _is_idle(host)]
        over = [host for host in idle if max(host.next_at, host.given_up_until) <= now]
        enough = len(self._hosts) - len(over) <= MAX_IDLE_HOSTS
        for host in over if enough else idle:
            del self._hosts[host.name]

    def _limit_of(self, host: Host[ItemT]) -> int:
        is_suspect = host.rests > 0 and self.given_up(host) is None
        return 1 if is_suspect else self._limit

    def _list(self, host: Host[ItemT]) -> None:
        """Put a host where it will be seen: among the ready, or in the timers when its pace says later."""
        if host.listed or not host.waiting or host.in_flight >= self._limit_of(host):
            return
        host.listed = True
        if host.next_at > self._loop.time() + TICK_S:
            heapq.heappush(self._timers, (host.next_at, next(self._ticket), host.name, None))
            self._set_alarm()
        else:
            self._ready.append(host)

    def _serve(self) -> None:
        while self._takers and self._ready:
            if self._takers[0].done():
                self._takers.popleft()
                continue
            host = self._ready.popleft()
            host.listed = False
            if not host.waiting:
                continue
            host.next_at = max(host.next_at, self._turn_at(host))
            if host.next_at > self._loop.time() + TICK_S:
                self._list(host)
                continue
            item = host.waiting.popleft()
            host.in_flight += 1
            gap = max(self._pace_s, host.delay_s)
            if gap:
                host.next_at = self._loop.time() + gap
            self._takers.popleft().set_result((host, item))
            self._list(host)

    def _turn_at(self, host: Host[ItemT]) -> float:
        """Return when this worker's turn at a host begins, in loop time; the past while it is on."""
        if self._turns == 1:
            return 0.0
        now = time.time()
        turn = int(now / TURN_S)
        ahead = (zlib.crc32(host.name.encode()) + self._number - turn) % self._turns
        return self._loop.time() + (turn + ahead) * TURN_S - now if ahead else 0.0

    def _set_alarm(self) -> None:
        if self._timers and (self._alarm is None or self._alarm_at > self._timers[0][0]):
            if self._alarm is not None:
                self._alarm.cancel()
            self._alarm_at = self._timers[0][0]
            self._alarm = self._loop.call_at(self._alarm_at, self._ring)

    def _ring(self) -> None:
        self._alarm = None
        while self._timers and self._timers[0][0] <= self._loop.time() + TICK_S:
            _, _, name, item = heapq.heappop(self._timers)
            if item is not None:
                self.put(name, item)
                continue
            host = self._hosts.get(name)
            if host is not None:
                host.listed = False
                self._list(host)
        self._set_alarm()
        self._serve()
