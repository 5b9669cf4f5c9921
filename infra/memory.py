"""How much memory a whole tree of processes takes, at its peak."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil

SAMPLE_EVERY_S = 1.0


class PeakMemory:
    """While the block runs, samples this process and all its descendants once a second.

    Shared pages count once: what is summed is the proportional set size where the system tells it (Linux),
    else the resident size.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, tree_memory_bytes())
            if self._stop.wait(SAMPLE_EVERY_S):
                return


def tree_memory_bytes() -> int:
    """Return the memory of this process and its descendants now, in bytes."""
    own = psutil.Process()
    return sum(_memory_bytes(process) for process in [own, *own.children(recursive=True)])


def _memory_bytes(process: psutil.Process) -> int:
    try:
        full = process.memory_full_info()
        return int(getattr(full, "pss", full.rss))
    except psutil.Error:  # it ended meanwhile, or is not ours to look into
        return 0
