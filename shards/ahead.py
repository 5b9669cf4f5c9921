"""Reads ahead of a stream: what coming steps need is read in the background, and let go when no step needs it."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from shards.order import Step
from shards.reads import Piece, Reader

MOST_STEPS_AHEAD = 256
Run = tuple[int, int]
"""Epoch, and number of the run in it."""


class _Coming(NamedTuple):
    """A run that is being read: place `place` of what the future brings."""

    future: Future[list[list[Piece]]]
    place: int


class Wanted(NamedTuple):
    """A step of an order, and who reads for it."""

    ahead: ReadAhead
    step: Step


def read_ahead(steps: Iterable[list[Wanted]], limit_bytes: int) -> Iterator[tuple[list[Wanted], list[list[Piece]]]]:
    """Yield steps with the pieces that hold their samples, up to `limit_bytes` of later ones being read meanwhile."""
    coming, waiting = iter(steps), deque[list[Wanted]]()
    ahead_bytes = 0
    while True:
        while len(waiting) <= MOST_STEPS_AHEAD and (not waiting or ahead_bytes < limit_bytes):
            step = next(coming, None)
            if step is None:
                break
            ahead_bytes += sum(wanted.ahead.request(wanted.step) for wanted in step)
            waiting.append(step)
        if not waiting:
            return
        step = waiting.popleft()
        taken = [wanted.ahead.take(wanted.step) for wanted in step]
        ahead_bytes -= sum(size for _, size in taken)
        yield step, [pieces for pieces, _ in taken]


class ReadAhead:
    """Holds the runs that coming steps need, and reads them in the background in the order of first need.

    From a local disk the runs of one step are read one after another, by one thread: handing each to a thread of its
    own would cost more than to read it. Elsewhere all are under way at once, as far as there are threads.
    """

    def __init__(self, reader: Reader, threads: int) -> None:
        self.reader = reader
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="shard-read")
        self._runs: dict[Run, list[Piece] | _Coming] = {}
        self._brings: dict[tuple[int, int], int] = {}
        self._ends: defaultdict[tuple[int, int], list[Run]] = defaultdict(list)

    def request(self, step: Step) -> int:
        """Start reading what `step` needs and no earlier step did; return how many bytes that is."""
        epoch, first, stop, until = step.epoch, step.first, step.stop, step.until
        new, bounds, size = [], [], 0
        for run, place in dict(zip(step.run.tolist(), range(len(step.run)), strict=True)).items():
            name = (epoch, run)
            if name in self._runs:
                continue
            self._runs[name] = []
            new.append(name)
            bounds.append((int(first[place]), int(stop[place])))
            size += self.reader.size(*bounds[-1])
            self._ends[epoch, int(until[place])].append(name)
        each = max(1, len(bounds)) if self.reader.folder.is_local else 1
        for start in range(0, len(bounds), each):
            future = self._pool.submit(self._read, bounds[start : start + each])
            for place, name in enumerate(new[start : start + each]):
                self._runs[name] = _Coming(future, place)
        self._brings[epoch, step.step] = size
        return size

    def take(self, step: Step) -> tuple[list[Piece], int]:
        """Return the piece that holds each of the step's samples, `[B]`, and how many bytes its request was.

        Waits for what is on its way.

        The memory of runs that no later step needs is let go.
        """
        taken = []
        for run, sample in zip(step.run.tolist(), step.sample.tolist(), strict=True):
            pieces = self._runs[step.epoch, run]
            if isinstance(pieces, _Coming):
                pieces = self._runs[step.epoch, run] = pieces.future.result()[pieces.place]
            piece = pieces[-1]
            taken.append(piece if piece.first <= sample else next(p for p in reversed(pieces) if p.first <= sample))
        for name in self._ends.pop((step.epoch, step.step), ()):
            del self._runs[name]
        return taken, self._brings.pop((step.epoch, step.step))

    def _read(self, bounds: list[tuple[int, int]]) -> list[list[Piece]]:
        return [self.reader.read(first, stop) for first, stop in bounds]

    def close(self) -> None:
        """Drop what is not begun, end what is tried again, and wait for no one."""
        self.reader.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
