"""Links of samples to better ones over a cosine, of which each sample holds those to the best."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dedup.clusters import Rows
from dedup.components import Components
from dedup.semantic import Cosines, NearPairs

MOST_LINKS = 64
"""Links to better samples that are held of each: the best ones, which are likeliest to stay. So thousands of samples
that all are near each other take no square of them; one whose 64 best all go stays, be there a 65th."""
_HELD_PAIRS = 1 << 22


class Found(NamedTuple):
    """What some pairs come to: links to hold, edges that make the same components, and how many pairs there were."""

    links: NearPairs
    edges: tuple[Rows, Rows]
    pairs: int


class BestLinks:
    """Pairs of `N` samples, of which each holds the links to its `MOST_LINKS` best; `place` `[N]` ranks them.

    What they come to is the same however the pairs were cut into parts, and in whatever order those came.
    """

    def __init__(self, place: Rows) -> None:
        """Hold none yet."""
        self.count, self.components = 0, Components(len(place))
        self._place = place
        self._held: list[NearPairs] = []
        self._pairs, self._room = 0, _HELD_PAIRS

    def add(self, pairs: NearPairs) -> None:
        """Take in one part."""
        self._hold(pairs, (pairs.first, pairs.second), len(pairs.first))

    def merge(self, found: Found) -> None:
        """Take in what parts that were held elsewhere came to."""
        self._hold(*found)

    def found(self, rows: Rows) -> Found:
        """Return what all parts came to, with `rows` `[N]` for the samples' numbers."""
        better, worse, cosine = self.best()
        one, other = self.components.forest()
        return Found(NearPairs(rows[better], rows[worse], cosine), (rows[one], rows[other]), self.count)

    def best(self) -> tuple[Rows, Rows, Cosines]:
        """Return better samples, worse ones, and their cosines, each `[L]`."""
        first, second, cosine = NearPairs.joined(self._held)
        swap = self._place[first] > self._place[second]
        better, worse = np.where(swap, second, first), np.where(swap, first, second)
        order = np.lexsort((self._place[better], worse))
        better, worse, cosine = better[order], worse[order], cosine[order]
        ahead = np.arange(len(worse)) - np.searchsorted(worse, worse)
        held = ahead < MOST_LINKS
        return better[held], worse[held], cosine[held]

    def _hold(self, links: NearPairs, edges: tuple[Rows, Rows], count: int) -> None:
        self.components.join(*edges)
        self.count += count
        self._held.append(links)
        self._pairs += len(links.first)
        if self._pairs > self._room:
            self._held = [NearPairs(*self.best())]
            self._pairs = len(self._held[0].first)
            self._room = max(_HELD_PAIRS, 2 * self._pairs)
