"""What the log says of a stream's holes: a shard's first ones by number, then that there are more."""

from __future__ import annotations

from infra.logs import log

NAMED = 5
"""Holes of a shard that the log names; a stream's `holes` counts them all."""


class HoleLog:
    """Names holes in the log."""

    def __init__(self) -> None:
        self._named: dict[str, int] = {}

    def name(self, url: str, number: int, error: Exception) -> None:
        """Say that a sample of the tar at `url` is a hole, and why; once that there are more than are named."""
        count = self._named[url] = self._named.get(url, 0) + 1
        if count <= NAMED:
            log.warning("%s: sample %d is a hole: %s", url, number, error)
        elif count == NAMED + 1:
            log.warning("%s: more holes; they are counted and not named", url)
