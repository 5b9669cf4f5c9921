"""Names the ranks that a run is waiting for.

Each rank's thread puts a beat into the process group's store: a count, the step, and where the main thread is. When a
rank has taken no step for a while, it looks at the others' beats. Who does not beat any more is named at once, whatever
the ranks are at; who beats but is a step behind, once the step or measurement takes longer than such a one may.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from infra.logs import log
from train.parallel import rank, world_size
from train.patience import Patience

STALLS_NAME = "stalls.jsonl"
BEATS = 6
"""Beats in the time after which a stall is looked into."""
SILENT_BEATS = 3
"""Beats that a rank may leave out before it is said not to answer."""
AGAIN_S = 60.0
NAMED_RANKS = 8
LOOKOUTS = 3
"""Ranks that look for silent ones; if all of them are silent the others find out when their patience ends."""
ROOT = str(Path(__file__).parent.parent)


class Heartbeat:
    """Watches the ranks while the block runs.

    Args:
        step: tells how many steps this rank has taken.
        folder: the run's, for `stalls.jsonl`.
        stall_s: seconds without a step after which ranks that do not answer are named, and those that are behind if
            steps are not usually as long; 0: nobody watches.
        longest_s: see `Patience`.
    """

    def __init__(self, step: Callable[[], int], folder: Path, stall_s: float, longest_s: float = 0.0) -> None:
        self.step, self.folder, self.stall_s = step, folder, stall_s
        self.beat_s = stall_s / BEATS
        self._main = threading.get_ident()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._heard: dict[int, tuple[int, float]] = {}
        self._beats = 0
        self._patience = Patience(stall_s, longest_s)
        self._stage = 0  # odd: in the midst of what is no step
        self._looks = 0
        self._last: dict[int, dict[str, Any]] = {}

    def __enter__(self) -> Heartbeat:
        if world_size() > 1 and self.stall_s:
            # A connection of its own: the main thread may hold the other while it waits.
            store: Any = dist.distributed_c10d._get_default_store()
            self._store = dist.PrefixStore("heartbeat", store.clone())
            self._beat()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        if self._thread.is_alive():
            self._thread.join(timeout=self.beat_s)

    @contextmanager
    def at_length(self) -> Iterator[None]:
        """Be patient while the block runs, which is no step and takes as long as `Patience` learns; every rank enters.

        Who does not answer is named as ever.
        """
        self._stage += 1
        try:
            yield
        finally:
            self._stage += 1

    def _watch(self) -> None:
        step, stage, since, told = self.step(), self._stage, time.monotonic(), 0.0
        while not self._left.wait(self.beat_s):
            now = time.monotonic()
            try:
                self._beat()
                if (self.step(), self._stage) != (step, stage):
                    self._learn(now - since, self.step() - step, stage)
                    step, stage, since, told = self.step(), self._stage, now, 0.0
                    self._looks = 0
                elif self._is_late(now, since, stage) and now > told:
                    self._tell(now - since)
                    told = now + AGAIN_S
            except (RuntimeError, OSError) as error:
                if not self._left.is_set():
                    log.warning("train: no rank is watched any more: %s", str(error).splitlines()[0])
                return

    def _learn(self, took_s: float, steps: int, stage: int) -> None:
        if stage % 2:
            self._patience.lasted(took_s)
        elif self._stage == stage:
            self._patience.stepped(took_s / steps)

    def _is_late(self, now: float, since: float, stage: int) -> bool:
        """Tell whether there is somebody to name: a silent rank at once, one that answers once patience ends."""
        patience = self._patience.for_other_s() if stage % 2 else self._patience.for_step_s()
        is_over = now - since > patience
        if not (is_over or (rank() < LOOKOUTS and now - since > self.stall_s)):
            return False
        return self._look(now) and (is_over or bool(self._silent(now)))

    def _beat(self) -> None:
        self._beats += 1
        beat = {"beat": self._beats, "step": self.step(), "where": self._where()}
        process = {"host": socket.gethostname(), "process": os.getpid()}
        self._store.set(str(rank()), json.dumps(beat | process))

    def _where(self) -> str:
        """Return the line of ours that the main thread is in."""
        frame: FrameType | None = sys._current_frames().get(self._main)
        while frame is not None and not frame.f_code.co_filename.startswith(ROOT + os.sep + "train"):
            frame = frame.f_back
        if frame is None:
            return "unknown"
        return f"{os.path.relpath(frame.f_code.co_filename, ROOT)}:{frame.f_lineno} in {frame.f_code.co_name}"

    def _look(self, now: float) -> bool:
        """Read every rank's beat; tell whether they have been watched long enough to know who is silent."""
        self._last = {other: json.loads(self._store.get(str(other))) for other in range(world_size())}
        for other, beat in self._last.items():
            if self._heard.get(other, (0, 0.0))[0] != beat["beat"]:
                self._heard[other] = (beat["beat"], now)
        self._looks += 1
        return self._looks > SILENT_BEATS

    def _tell(self, seconds: float) -> None:
        silent = self._silent(time.monotonic())
        behind = silent | self._behind(silent)
        speaker = min(set(self._last) - silent, default=rank())
        if speaker != rank():
            return
        found = [{"rank": one, "answers": one not in silent, **self._last[one]} for one in sorted(behind)]
        named = "; ".join(_named(one) for one in found[:NAMED_RANKS]) + ("; ..." if len(found) > NAMED_RANKS else "")
        log.warning("train: no step for %.0f s after step %d; behind: %s", seconds, self.step(), named)
        line = {"step": self.step(), "seconds": round(seconds, 1), "behind": found}
        with (self.folder / STALLS_NAME).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def _silent(self, now: float) -> set[int]:
        return {other for other, (_, at) in self._heard.items() if now - at > (SILENT_BEATS - 1) * self.beat_s}

    def _behind(self, silent: set[int]) -> set[int]:
        """Return who has taken fewer steps than the others or, at the same step, is where most are not."""
        furthest = max(beat["step"] for beat in self._last.values())
        late = {other for other, beat in self._last.items() if beat["step"] < furthest}
        if late or silent:
            return late
        usual, count = Counter(beat["where"] for beat in self._last.values()).most_common(1)[0]
        alone = {other for other, beat in self._last.items() if beat["where"] != usual}
        return alone if alone and 2 * count > world_size() else set(self._last)


def _named(found: dict[str, Any]) -> str:
    state = "is" if found["answers"] else "does not answer, last"
    who = f"rank {found['rank']} (process {found['process']} on {found['host']})"
    return f"{who} {state} at {found['where']}, after step {found['step']}"
