"""A few of very many pairs on both sides of a threshold, by chance, whatever parts and order they come in."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]

STEPS = 8
"""Each side of a threshold is cut into so many steps, and all are drawn from alike: there are far more pairs far out
than near, and who looks at them wants to see where copies end."""
_LAST = np.uint64(2**64 - 1)


class Drawn(NamedTuple):
    """Pairs of samples, the lower one first, and on which side of the threshold they lie, each `[P]`."""

    first: Rows
    second: Rows
    is_within: npt.NDArray[np.bool_]


NONE = Drawn(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, bool))


class Draw:
    """Of each drawn sample one pair a step; a crowd of samples that all are near each other takes no more than that.

    Every pair has a number by chance, which follows from its samples and the seed alone, and the lowest is taken.
    """

    def __init__(self, rows: int, seed: int) -> None:
        """Begin with `rows` drawn samples and no pair."""
        self._number = np.full(rows * 2 * STEPS, _LAST)
        self._pairs = np.zeros((len(self._number), 2), np.int64)
        self._factors = np.random.default_rng(seed).integers(0, 2**64, 4, dtype=np.uint64) | np.uint64(1)

    def add(self, row: Rows, step: npt.NDArray[Any], first: Rows, second: Rows) -> None:
        """Take in pairs `[P]` of the drawn samples `row`, at steps 0 to 15, of which 8 and on lie beyond."""
        low, high = np.minimum(first, second), np.maximum(first, second)
        number, slot = self._numbers(low, high), row * 2 * STEPS + step
        may = np.flatnonzero(number < self._number[slot])
        order = may[np.lexsort((number[may], slot[may]))]
        taken, place = np.unique(slot[order], return_index=True)
        best = order[place]
        self._number[taken] = number[best]
        self._pairs[taken] = np.stack([low[best], high[best]], axis=1)

    def pairs(self, count: int) -> Drawn:
        """Return up to `count` pairs of each side, as many of each step as there are, each once."""
        slots = np.flatnonzero(self._number != _LAST)
        slots = slots[np.argsort(self._number[slots], kind="stable")]
        _, once = np.unique(self._pairs[slots], axis=0, return_index=True)
        slots = slots[np.sort(once)]
        step = slots % (2 * STEPS)
        turn = np.zeros(len(slots), np.int64)
        for one in range(2 * STEPS):
            at = np.flatnonzero(step == one)
            turn[at] = np.arange(len(at))
        chosen = []
        for side in (step < STEPS, step >= STEPS):
            at = np.flatnonzero(side)
            chosen.append(at[np.argsort(turn[at], kind="stable")[:count]])
        found = np.concatenate(chosen)
        first, second = self._pairs[slots[found]].T
        return Drawn(first, second, step[found] < STEPS)

    def _numbers(self, low: Rows, high: Rows) -> npt.NDArray[np.uint64]:
        mixed = low.astype(np.uint64) * self._factors[0] + high.astype(np.uint64) * self._factors[1]
        for factor in self._factors[2:]:
            mixed = (mixed ^ (mixed >> np.uint64(31))) * factor
        return mixed ^ (mixed >> np.uint64(32))
