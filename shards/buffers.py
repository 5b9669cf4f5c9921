"""Memory that ranged reads of a local disk go to, used again: fresh pages cost more than what is copied into them."""

from __future__ import annotations

import mmap
import weakref

POOLED_FROM_BYTES = 2**18
"""A smaller read is left to the C library, which keeps memory of its size at hand."""
_STEP_BYTES = 2**17
_LARGEST_WASTE = 1.25
"""How many times what is asked for a buffer may have."""
_FREE_BYTES = 2**26
"""Buffers that no one uses are kept up to so many bytes."""


class BufferPool:
    """Lends buffers for as long as an object lives. Any thread may borrow, and let an object go."""

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []

    def borrow(self, size: int) -> mmap.mmap:
        """Return a buffer of `size` bytes or somewhat more, whose content is anything."""
        for _ in range(len(self._free)):
            try:
                buffer = self._free.pop(0)
            except IndexError:  # another thread was quicker
                break
            if size <= len(buffer) <= max(size * _LARGEST_WASTE, size + _STEP_BYTES):
                return buffer
            self._free.append(buffer)
        return _fresh(-(-size // _STEP_BYTES) * _STEP_BYTES)

    def give_back(self, buffer: mmap.mmap) -> None:
        """Take a borrowed buffer back, for which there may be no room: the oldest free ones go first."""
        # No lock: this may run in the midst of anything, when an object goes.
        self._free.append(buffer)
        while sum(map(len, tuple(self._free))) > _FREE_BYTES:
            try:
                self._free.pop(0)
            except IndexError:
                break

    def lend(self, buffer: mmap.mmap, holder: object) -> None:
        """Take a borrowed buffer back once `holder` is gone."""
        weakref.finalize(holder, self.give_back, buffer).atexit = False


def _fresh(size: int) -> mmap.mmap:
    buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer
