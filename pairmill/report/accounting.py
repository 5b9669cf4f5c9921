"""Rows in = rows out at every stage: the table and its bars."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from infra.storage import Folder
from ingest.totals import read_commits, summed
from pairmill import show
from shards.layout import DEDUP, FINAL, PLAN, RAW, Reason, Status
from shards.manifest import Manifest
from shards.writer import committed

TITLES = {
    PLAN: ("Plan", "captions and addresses looked at, repeated addresses dropped"),
    RAW: ("Ingest", "fetched, decoded, resized"),
    DEDUP: ("Dedup", "the same picture kept once"),
    FINAL: ("Repack", "written to even shards, with the index"),
}
_COMMANDS = {PLAN: "plan", RAW: "ingest", DEDUP: "dedup", FINAL: "repack"}
_UNDECODED = {Reason.NOT_AN_IMAGE, Reason.DECODE_ERROR, Reason.TOO_MANY_PIXELS}
_REFUSED = {Reason.ROBOTS_TXT, Reason.OPT_OUT, Reason.TOO_SMALL, Reason.ASPECT, Reason.TAKEN_DOWN}
KEPT, REJECTED = "kept", "rejected"


@dataclass(frozen=True)
class Line:
    """One line of a stage's table; `tone` is what it is coloured by: `kept`, or a status."""

    name: str
    note: str
    count: int
    share: float
    tone: str
    is_status: bool


@dataclass(frozen=True)
class Stage:
    """One stage's rows; `lines` hold statuses, each followed by its reasons."""

    title: str
    about: str
    command: str
    rows_in: int
    rows_out: int
    lines: tuple[Line, ...]
    progress: str = ""

    @property
    def balances(self) -> bool:
        """Tell whether the rows by status add up to the rows that came in."""
        return self.rows_in == self.rows_out

    @property
    def statuses(self) -> list[Line]:
        """The parts of the stage's bar."""
        return [line for line in self.lines if line.is_status and line.count]

    @property
    def kept(self) -> int:
        """How many rows the next stage takes in."""
        return sum(line.count for line in self.statuses if line.tone == KEPT)


def stages(folder: Folder, manifest: Manifest) -> list[Stage]:
    """Return the accounting of every stage that has begun; of an unfinished ingest, what it has committed."""
    found = []
    for name in TITLES:
        totals = manifest.totals(name)
        if "rows_in" in totals and "by_status" in totals:
            found.append(stage(name, totals))
        elif name == RAW:
            found += _so_far(folder, manifest)
    return found


def stage(name: str, totals: Mapping[str, Any], progress: str = "") -> Stage:
    """Return a stage's accounting from its totals: `rows_in`, `by_status`, `by_reason`."""
    rows_in = int(totals["rows_in"])
    by_status = {str(status): int(count) for status, count in totals["by_status"].items()}
    reasons = [(reason, count) for _, reason, count in show.accounting(dict(totals)) if reason]
    groups = _grouped(name, by_status, reasons)
    order = sorted(by_status, key=lambda status: (status not in show.GOES_ON, -by_status[status]))
    lines = []
    for status in order:
        tone = KEPT if status in show.GOES_ON else status
        lines.append(_line(status, by_status[status], rows_in, tone, True))
        lines += [_line(reason, count, rows_in, tone, False) for reason, count in groups.pop(status, [])]
    lines += [_line(reason, count, rows_in, REJECTED, False) for rest in groups.values() for reason, count in rest]
    title, about = TITLES[name]
    return Stage(title, about, _COMMANDS[name], rows_in, sum(by_status.values()), tuple(lines), progress)


def waiting(found: list[Stage]) -> list[str]:
    """Return the commands of the stages that have not begun."""
    return [command for name, command in _COMMANDS.items() if TITLES[name][0] not in [one.title for one in found]]


def _grouped(
    name: str, by_status: Mapping[str, int], reasons: list[tuple[str, int]]
) -> dict[str, list[tuple[str, int]]]:
    """Put each reason under its status; under none if that does not add up to the stage's own sums."""
    groups: dict[str, list[tuple[str, int]]] = {}
    for reason, count in reasons:
        groups.setdefault(status_of(name, reason), []).append((reason, count))
    sums = {status: sum(count for _, count in group) for status, group in groups.items()}
    if any(by_status.get(status) != total for status, total in sums.items()):
        return {"": reasons}
    return groups


def status_of(stage_name: str, reason: str) -> str:
    """Return the status that a reason leads to at a stage."""
    if stage_name != RAW or reason in _REFUSED:
        return Status.FILTERED.value
    return Status.FAILED_TO_RESIZE.value if reason in _UNDECODED else Status.FAILED_TO_DOWNLOAD.value


def _line(name: str, count: int, rows_in: int, tone: str, is_status: bool) -> Line:
    words = name.replace("_", " ")
    return Line(words, "" if is_status else name, count, count / rows_in if rows_in else 0.0, tone, is_status)


def _so_far(folder: Folder, manifest: Manifest) -> list[Stage]:
    raw = folder / RAW
    totals = summed(read_commits(raw, committed(raw)))
    if not totals["shards"]:
        return []
    parts = manifest.totals(PLAN).get("parts", "?")
    return [stage(RAW, totals, f"{totals['shards']:,} of {parts} shards so far")]
