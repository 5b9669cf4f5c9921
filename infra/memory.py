"""How much memory a whole tree of processes takes, at its peak; and memory given back to the system."""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Callable
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


def give_back() -> None:
    """Return to the system the pages that the C library holds free (glibc's `malloc_trim`; elsewhere nothing).

    Blocks that threads allocate and others free leave holes in every thread's arena, which glibc keeps: they come
    to half as much again as is in use.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def _memory_bytes(process: psutil.Process) -> int:
    try:
        full = process.memory_full_info()
        return int(getattr(full, "pss", full.rss))
    except psutil.Error:  # it ended meanwhile, or is not ours to look into
        return 0
