"""No host gets more than its share, and no host holds up another."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest import politeness
from ingest.config import FetchConfig
from ingest.politeness import FEW_ROWS, HostQueues


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from("abcde"), min_size=1, max_size=80),
    st.integers(1, 5),
    st.integers(1, 12),
    st.integers(1, 3),
)
def test_every_item_comes_out_once_and_hosts_stay_in_bounds(
    hosts: list[str], limit: int, takers: int, workers: int
) -> None:
    peak: Counter[str] = Counter()
    now: Counter[str] = Counter()
    out: list[int] = []
    share = -(-limit // workers)

    async def taker(queues: HostQueues[int]) -> None:
        while True:
            host, item = await queues.take()
            now[host.name] += 1
            peak[host.name] = max(peak[host.name], now[host.name])
            await asyncio.sleep(0)
            now[host.name] -= 1
            out.append(item)
            queues.done(host)

    async def main() -> None:
        queues: HostQueues[int] = HostQueues(FetchConfig(per_host_in_flight=limit, per_host_per_s=0), workers)
        tasks = [asyncio.create_task(taker(queues)) for _ in range(takers)]
        for item, host in enumerate(hosts):
            queues.put(host, item, delay_s=0.001 if item % 7 == 0 else 0.0)
        while len(out) < len(hosts):
            await asyncio.sleep(0.001)
        for task in tasks:
            task.cancel()

    asyncio.run(main())
    assert sorted(out) == list(range(len(hosts)))
    assert max(peak.values()) <= share


def test_the_pace_of_a_host_holds_for_it_alone_and_is_shared_by_workers() -> None:
    async def main() -> dict[str, list[float]]:
        times: dict[str, list[float]] = {"slow": [], "other": []}
        queues: HostQueues[int] = HostQueues(FetchConfig(per_host_per_s=40.0), workers=2)
        for item in range(5):
            queues.put("slow", item)
        queues.put("other", 9)
        for _ in range(6):
            host, _ = await queues.take()
            times[host.name].append(asyncio.get_running_loop().time())
            queues.done(host)
        return times

    times = asyncio.run(main())
    gaps = [later - earlier for earlier, later in zip(times["slow"], times["slow"][1:], strict=False)]
    assert min(gaps) >= 2 / 40 - 0.005
    assert times["other"][0] < times["slow"][1]


def test_pause_and_crawl_delay_keep_a_host_waiting() -> None:
    async def main() -> list[float]:
        clock = asyncio.get_running_loop().time
        queues: HostQueues[int] = HostQueues(FetchConfig(per_host_per_s=0, crawl_delay_cap_s=0.08))
        for item in range(3):
            queues.put("a", item)
        times = []
        for step in range(3):
            host, _ = await queues.take()
            times.append(clock())
            if step == 0:
                queues.pause(host, 0.1, "retry_after")
            queues.slow_down(host, 60.0, host.delay_s)
            queues.done(host)
        return times

    first, second, third = asyncio.run(main())
    assert second - first >= 0.1 - 0.005
    assert third - second >= 0.08 - 0.005


def test_a_host_that_stays_away_rests_is_probed_and_is_then_given_up() -> None:
    async def main() -> None:
        rest = 0.05
        queues: HostQueues[int] = HostQueues(
            FetchConfig(breaker_failures=3, breaker_rest_s=rest, breaker_rests=2, per_host_per_s=0)
        )
        clock = asyncio.get_running_loop().time
        for item in range(12):
            queues.put("dead", item)
        taken = [(await queues.take())[0] for _ in range(FEW_ROWS)]
        host = taken[0]
        queues.reached(host)
        before = clock()
        for number, _ in enumerate(taken):
            queues.missed(host, f"row {number}", "connect", "refused")
            queues.done(host)
        for rests in (1, 2):
            assert host.rests == rests
            assert queues.given_up(host) is None
            await queues.take()
            assert clock() - before >= rest * (2**rests - 1) - 0.01, "each rest is twice the one before"
            assert not await another(queues), "one request at a time while nobody knows"
            queues.missed(host, "row 0", "timeout", "silence")
            queues.done(host)
        assert queues.given_up(host) == ("timeout", "silence")
        for _ in range(5):
            await queues.take()
        queues.reached(host)
        assert (host.failures, host.rests) == (0, 0)

    async def another(queues: HostQueues[int]) -> bool:
        task = asyncio.create_task(queues.take())
        done, _ = await asyncio.wait((task,), timeout=0.01)
        task.cancel()
        return bool(done)

    asyncio.run(main())


def test_a_host_that_hangs_and_never_answered_is_given_up_without_a_rest() -> None:
    async def main() -> None:
        queues: HostQueues[int] = HostQueues(FetchConfig(breaker_failures=8, per_host_per_s=0))
        for item in range(4):
            queues.put("hangs", item)
        for _ in range(2):
            host, _ = await queues.take()
            assert queues.given_up(host) is None
            queues.missed(host, "row 0", "timeout", "silence")
            queues.done(host)
        assert queues.given_up(host) == ("timeout", "silence")

    asyncio.run(main())


def test_a_host_rests_for_a_row_if_nobody_was_answered_since_it_failed() -> None:
    async def main() -> None:
        queues: HostQueues[int] = HostQueues(FetchConfig(per_host_per_s=0))
        clock = asyncio.get_running_loop().time
        queues.put("away", 1)
        host, _ = await queues.take()
        queues.missed(host, "row 0", "connection_reset", "")
        assert not queues.rests_instead(host, clock()), "it has never answered"
        failed_at = clock()
        queues.reached(host)
        assert not queues.rests_instead(host, failed_at), "another row was answered since"
        await asyncio.sleep(0.01)
        assert queues.rests_instead(host, clock())
        assert queues.is_away(host)
        queues.reached(host)
        assert not queues.is_away(host)

    asyncio.run(main())


def test_workers_beyond_the_bound_take_turns_at_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve workers and a bound of three: in a turn three of them may ask, all of them in four turns."""
    monkeypatch.setattr(politeness, "TURN_S", 0.2)
    asked: list[tuple[int, int]] = []

    async def worker(number: int, until: float) -> None:
        queues: HostQueues[int] = HostQueues(FetchConfig(per_host_in_flight=3, per_host_per_s=0), 12, number)
        for item in range(1000):
            queues.put("one.host", item)
        while time.time() < until:
            host, _ = await queues.take()
            asked.append((int(time.time() / politeness.TURN_S), number))
            await asyncio.sleep(0.02)
            queues.done(host)

    async def main() -> None:
        until = time.time() + 6 * politeness.TURN_S
        tasks = [asyncio.create_task(worker(number, until)) for number in range(12)]
        await asyncio.wait(tasks, timeout=10 * politeness.TURN_S)
        for task in tasks:
            task.cancel()

    asyncio.run(main())
    turns = sorted({turn for turn, _ in asked})
    by_turn = [{number for at, number in asked if at == turn} for turn in turns]
    assert {number for numbers in by_turn for number in numbers} == set(range(12))
    assert all(len(numbers) <= 3 for numbers in by_turn)


def test_hosts_that_no_longer_exist_are_forgotten_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(politeness, "MAX_IDLE_HOSTS", 10)
    config = FetchConfig(breaker_failures=1, breaker_rests=1, breaker_rest_s=3600)

    async def main() -> tuple[int, bool]:
        queues: HostQueues[int] = HostQueues(config)
        for number in range(500):
            queues.put(f"dead{number}", number)
            host, _ = await queues.take()
            queues.missed(host, f"row{number}", "timeout", "connect")
            queues.done(host)
        return len(queues._hosts), queues.given_up(queues._hosts["dead499"]) is not None

    kept, is_still_given_up = asyncio.run(main())
    assert kept <= 21
    assert is_still_given_up
