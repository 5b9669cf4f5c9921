"""The board on which the driver and the ranks of a run on Ray leave word for each other."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass


@dataclass(frozen=True)
class Failure:
    """Why a rank ended: `kind` is `user` (a mistake to mend), `run` (a failure with words) or `crash`."""

    rank: int
    host: str
    kind: str
    message: str


class Board:
    """An actor beside the driver: whether the ranks are to stop, who has arrived, and why who failed."""

    def __init__(self) -> None:
        self._stop = asyncio.Event()
        self._hosts: dict[int, str] = {}
        self._failures: list[Failure] = []

    async def stop(self) -> None:
        """Ask the ranks to save a checkpoint and leave."""
        self._stop.set()

    async def until_stop(self) -> None:
        """Return once they are asked to."""
        await self._stop.wait()

    async def arrive(self, rank: int, host: str) -> None:
        """Take down where a rank runs."""
        self._hosts[rank] = host

    async def hosts(self) -> dict[int, str]:
        """Return the host of each rank that has arrived."""
        return self._hosts

    async def fail(self, failure: Failure) -> None:
        """Take down why a rank ends."""
        self._failures.append(failure)

    async def failures(self) -> list[Failure]:
        """Return what was taken down, the first failure first."""
        return self._failures
