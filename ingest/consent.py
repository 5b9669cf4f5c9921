"""The rights holder's word: robots.txt, X-Robots-Tag, and the TDM reservation; with the evidence, word for word."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from protego import Protego

MAX_ROBOTS_BYTES = 500 * 1024
"""What is read of a robots.txt; RFC 9309, section 2.5 asks for at least this much."""
MAX_ORIGINS = 20_000
MAX_RULES_BYTES = 6 * 2**20
"""Text of the robots.txt files remembered; their rules take up to thirty times as much memory."""
MAX_EVIDENCE_LINES = 1000
"""Rules that are tried one by one to find the one that bars; a host with more of them gets a shorter evidence."""
_WITH_VALUES = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")
KEEP_S = 24 * 3600.0
"""How long a robots.txt is gone by; RFC 9309, section 2.4 asks for no more than this."""
RESERVATION = "tdm-reservation"


def opt_out_evidence(headers: Iterable[tuple[str, str]], words: Iterable[str], agent: str) -> str | None:
    """Return the header by which an answer opts out, as `Name: value`; None if it does not.

    `words` are directives of X-Robots-Tag in lower case, and `tdm-reservation` for the header of the W3C's
    TDM Reservation Protocol. A directive scoped to another crawler (`otherbot: noai`) does not count, one
    scoped to `agent` does.
    """
    wanted = frozenset(words)
    for name, value in headers:
        lower = name.lower()
        if lower == "x-robots-tag" and not wanted.isdisjoint(_directives(value, agent)):
            return f"{name}: {value}"
        if lower == RESERVATION and RESERVATION in wanted and value.strip() == "1":
            return f"{name}: {value}"
    return None


def _directives(value: str, agent: str) -> Iterable[str]:
    """Yield the directives of one header line that address `agent`; a scope lasts until the next one."""
    applies = True
    for part in value.lower().split(","):
        word = part.strip()
        scope, colon, rest = word.partition(":")
        scope = scope.strip()
        if colon and scope not in _WITH_VALUES and " " not in scope:  # a date has colons too
            applies = scope in (agent, "*")
            word = rest.strip()
        if applies:
            yield word


@dataclass(frozen=True)
class RobotsAnswer:
    """What a host said of its robots.txt: the HTTP status, below 500, and the text of a 200."""

    status: int
    text: str = ""


@dataclass(frozen=True)
class Rules:
    """The rules of one origin for one crawler."""

    parsed: Protego | None
    text: str

    def barred(self, url: str, agent: str) -> str | None:
        """Return the rule that bars `url`, as evidence; None if it may be fetched."""
        if self.parsed is None or self.parsed.can_fetch(url, agent):
            return None
        return _barring_line(self.text, url, agent)

    def delay_s(self, agent: str) -> float:
        """Return the Crawl-delay asked for, in seconds; 0 without one."""
        return float((self.parsed.crawl_delay(agent) if self.parsed else None) or 0.0)


def read_rules(answer: RobotsAnswer) -> Rules:
    """Read an answer by RFC 9309, section 2.3.1: 4xx allows all. A 5xx is no answer, and whoever asks sees to it."""
    if answer.status != 200 or not answer.text.strip():
        return Rules(None, "")
    return Rules(Protego.parse(answer.text), answer.text)


@dataclass(frozen=True, eq=False)
class _Known:
    """The rules of one origin, there or on their way; `until` is when they are asked for again, in loop time."""

    rules: asyncio.Future[Rules]
    until: float

    @property
    def text_bytes(self) -> int:
        is_there = self.rules.done() and not self.rules.cancelled() and self.rules.exception() is None
        return len(self.rules.result().text) if is_there else 0


class Robots:
    """The rules of every origin met, each asked for once a day while it is remembered."""

    def __init__(self) -> None:
        self._bytes = 0
        self._known: OrderedDict[str, _Known] = OrderedDict()

    async def rules(self, url: str, ask: Callable[[str], Awaitable[RobotsAnswer]]) -> Rules:
        """Return the rules for `url`'s origin; `ask` fetches its robots.txt when nobody has yet.

        What `ask` raises is raised to all who wait for it, and forgotten: the next one asks again.
        """
        parts = urlsplit(url)
        origin = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}".lower()
        loop = asyncio.get_running_loop()
        known = self._known.get(origin)
        if known is not None and loop.time() < known.until:
            self._known.move_to_end(origin)
        else:
            self._drop(origin)
            known = self._known[origin] = _Known(loop.create_future(), loop.time() + KEEP_S)
            try:
                known.rules.set_result(read_rules(await ask(f"{origin}/robots.txt")))
            except Exception as error:
                if self._known.get(origin) is known:
                    self._drop(origin)
                known.rules.set_exception(error)
                known.rules.exception()  # there may be nobody else to retrieve it
                raise
            finally:
                known.rules.cancel()  # without effect on one that is done
            if self._known.get(origin) is known:
                self._bytes += known.text_bytes
                self._forget()
        return await asyncio.shield(known.rules)

    def _forget(self) -> None:
        """Let go of the rules unused for longest, when they are too many or too long."""
        while len(self._known) > MAX_ORIGINS or (self._bytes > MAX_RULES_BYTES and len(self._known) > 1):
            self._drop(next(iter(self._known)))

    def _drop(self, origin: str) -> None:
        known = self._known.pop(origin, None)
        if known is not None:
            self._bytes -= known.text_bytes


def _barring_line(text: str, url: str, agent: str) -> str:
    """Find the Disallow line that bars `url`: the longest that does so alone, of the crawler's own group first."""
    best = ""
    for own in (True, False):
        for line in _disallow_lines(text, agent, own=own)[:MAX_EVIDENCE_LINES]:
            alone = Protego.parse(f"User-agent: *\n{line}\n")
            if len(line) > len(best) and not alone.can_fetch(url, agent):
                best = line
        if best:
            break
    return f"robots.txt: {best or 'barred'}"


def _disallow_lines(text: str, agent: str, *, own: bool) -> list[str]:
    found: list[str] = []
    agents: set[str] = set()
    in_agents = False
    for raw in text.splitlines():
        line = raw.split("#", 1)[0].strip()
        name, _, value = line.partition(":")
        field, value = name.strip().lower(), value.strip()
        if field == "user-agent":
            agents = agents if in_agents else set()
            agents.add(value.lower())
        in_agents = field == "user-agent" or (in_agents and not line)
        mine = any(one != "*" and one in agent for one in agents) if own else "*" in agents
        if field == "disallow" and value and mine:
            found.append(line)
    return found
