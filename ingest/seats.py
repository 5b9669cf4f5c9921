"""Places for requests: so many that make progress, and some more for those that wait for an answer in vain."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

HANGS_AFTER_S = 2.0
"""A request that has waited this long for the head of its answer no longer counts: it costs a socket, and no core."""
MOST_HANGING = 2
"""Times the seats: how many such requests there may be."""


@dataclass(slots=True)
class Seat:
    """One request's place. Once its request hangs, another takes the place, and this seat goes when it ends."""

    waits_since: float = 0.0
    is_lent: bool = False

    def waits(self) -> None:
        """Note that a request begins."""
        self.waits_since = time.monotonic()

    def answered(self) -> None:
        """Note that its answer has begun, or that it has ended."""
        self.waits_since = 0.0


class Seats:
    """Runs `work(seat)` in `count` tasks, and in one more for each that hangs. Make it inside a running loop.

    A `work` returns when its seat was lent and free again; what it raises goes to `failed`.
    """

    def __init__(
        self, count: int, work: Callable[[Seat], Coroutine[Any, Any, None]], failed: Callable[[BaseException], None]
    ) -> None:
        self._count, self._work, self._failed = count, work, failed
        self._loop = asyncio.get_running_loop()
        self._seats: dict[asyncio.Task[None], Seat] = {}
        for _ in range(count):
            self._add()
        self._look_again()

    async def close(self) -> None:
        """Cancel what is under way."""
        self._alarm.cancel()
        tasks = list(self._seats)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _add(self) -> None:
        seat = Seat()
        task = self._loop.create_task(self._work(seat))
        self._seats[task] = seat
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._seats[task]
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._failed(error)

    def _look_again(self) -> None:
        self._alarm = self._loop.call_later(HANGS_AFTER_S / 2, self._lend)

    def _lend(self) -> None:
        room = (1 + MOST_HANGING) * self._count - len(self._seats)
        since = time.monotonic() - HANGS_AFTER_S
        for seat in list(self._seats.values()):
            if room > 0 and not seat.is_lent and 0 < seat.waits_since < since:
                seat.is_lent = True
                self._add()
                room -= 1
        self._look_again()
