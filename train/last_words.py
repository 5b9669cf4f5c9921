"""What ranks said before they died: shown once, and kept in the run's folder."""

from __future__ import annotations

import json
import math
import os
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from infra.logs import log
from infra.storage import Folder

KEPT_NAME = "failed-ranks.txt"
SHOWN_LINES = 30
FAULT, FAULTY_THREAD, MODULES = "Fatal Python error", "Current thread", "Extension modules"
"""How the report of a native fault begins; where, after the other threads, the faulty one's calls begin, the last one
first; and what follows them."""
TAIL_BYTES = 65_536
CHANGING = re.compile(r"0x[0-9a-f]+|\d+")
"""What differs between ranks that die of the same thing: ports, addresses, their own number."""


TIMEOUT = re.compile(r"tim(e|ed) ?out", re.IGNORECASE)
"""Among the words of whatever waits for messages: gloo, NCCL, the store."""


@dataclass(frozen=True)
class Failure:
    """How a rank ended.

    Attributes:
        rank: its number.
        code: its exit code, or minus a signal's number.
        kind: `user` (a mistake to mend), `run` (a failure with words), `crash`; empty if it said nothing itself.
        message: one line.
        at: when it said so, on this machine's monotonic clock, s.
        traceback: of the exception, or of the native fault.
        errors: the last of its standard error, where nobody else has seen it.
    """

    rank: int
    code: int
    kind: str = ""
    message: str = ""
    at: float = math.inf
    traceback: str = ""
    errors: str = ""

    @property
    def words(self) -> str:
        """What it died of, in one line."""
        if self.code < 0:
            return f"killed by {_signal_name(-self.code)}"
        return self.message or f"exit code {self.code}"

    @property
    def is_timeout(self) -> bool:
        """Whether it waited for another rank in vain."""
        return self.kind == "crash" and TIMEOUT.search(self.message) is not None

    @property
    def text(self) -> str:
        """All that is known of it."""
        return "\n\n".join(part.strip("\n") for part in (self.errors, self.traceback) if part.strip())


def report_path(folder: Path, rank: int) -> Path:
    """Return where a rank puts its report; `.fault` and `.stderr` beside it are for what it cannot say itself."""
    return folder / str(rank)


def read_failure(folder: Path, rank: int, code: int) -> Failure:
    """Return how a rank ended with `code`, from what it left in `folder`."""
    path = report_path(folder, rank)
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        report = {}  # it was killed before, or while it wrote
    fault, errors = _tail(path.with_suffix(".fault")), _tail(path.with_suffix(".stderr"))
    report.setdefault("traceback", fault)
    return Failure(rank, code, errors=errors, **report)


def cause(failures: Sequence[Failure]) -> Failure:
    """Return the failure that the others followed from: one whose peer was killed fails too, a little later."""

    def blame(one: Failure) -> tuple[int, float, int]:
        grade = 0 if one.kind in ("user", "run") else 1 if one.code < 0 else 2
        return grade, one.at, one.rank

    return min(failures, key=blame)


def tell(failures: Sequence[Failure], run: Path, nproc: int) -> None:
    """Show the last words of ranks that died, each kind once, the cause first; keep all in the run's folder."""
    first = cause(failures)
    groups: dict[str, list[Failure]] = {_kind(first): []}
    for failure in failures:
        groups.setdefault(_kind(failure), []).append(failure)
    if not any(one.text for one in failures):
        Folder(run).delete(KEPT_NAME)  # of an earlier start, which did not end of this
        return
    kept: list[str] = []
    shown: list[str] = []
    for alike in groups.values():
        spoken = next((one for one in alike if one.text), alike[0])
        numbers = ", ".join(str(one.rank) for one in alike)
        head = f"rank{'s' if len(alike) > 1 else ''} {numbers} of {nproc}: {spoken.words}"
        kept.append(f"{head}\n\n{spoken.text}\n")
        shown.append(f"after that {head}" if shown else "\n".join([head, *_shown(spoken.text)]))
    Folder(run).write(KEPT_NAME, "\n".join(kept).encode("utf-8", "replace"))
    log.error("train: %s\nAll of it is in %s", "\n".join(shown), run / KEPT_NAME)


def _shown(text: str) -> list[str]:
    """Return what of a rank's words fits a screen: the end, of a native fault its name and the calls it came from."""
    lines = text.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith(FAULT)]
    if not starts:
        return lines[-SHOWN_LINES:]
    fault = lines[starts[-1] :]
    stack = [number for number, line in enumerate(fault) if line.startswith(FAULTY_THREAD)]
    calls = [line for line in fault[stack[0] if stack else 1 :] if line and not line.startswith(MODULES)]
    if len(calls) > SHOWN_LINES:
        calls[SHOWN_LINES // 2 : -SHOWN_LINES // 2] = ["  ..."]
    return [fault[0], *calls]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _kind(failure: Failure) -> str:
    lines = failure.traceback.strip().splitlines() if failure.code >= 0 else []
    return CHANGING.sub("#", f"{failure.words} {lines[-1] if lines else ''}")


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - TAIL_BYTES))
            return stream.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
