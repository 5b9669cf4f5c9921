"""Several corpora mixed by weight: which corpus, and which of its samples, at which step. Pure arithmetic, as `order`.

Weights are rounded to thousandths, and a pattern of a thousand places spreads each corpus' share evenly over it. Every
lane walks that pattern from a place of its own; what it takes from a corpus are the next places of the same lane in
that corpus' own order. So each corpus is seen exactly once in each of its own epochs, in any world, and a few
whole numbers say where a run stands.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

import numpy as np

from infra.errors import UserError
from shards.order import Ints, Order, Step

PLACES = 1000
"""Length of the pattern: shares are whole thousandths."""
_GOLDEN_PLACES = 619
"""From one lane's place in the pattern to the next one's: the golden ratio's part of it, prime to its length."""
_CHUNK_SLOTS = 1 << 16


class Portion(NamedTuple):
    """What a step takes from one corpus; `epochs` is the corpus' own epoch in each of the step's slots, `[n]`."""

    corpus: int
    step: Step
    epochs: Ints


def shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Return the weights as thousandths that add up to a thousand, by largest remainders.

    Raises:
        UserError: a weight is no number or not above 0, or too small beside the others.
    """
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, Real):
            raise UserError(f"weight {weight!r}: give each corpus a number above 0")
    if not weights or not all(weight > 0 and np.isfinite(weight) for weight in weights):
        raise UserError(f"weights {', '.join(map(str, weights))}: give each corpus a weight above 0")
    exact = [weight * PLACES / sum(weights) for weight in weights]
    found = [int(share) for share in exact]
    most_cut = sorted(range(len(exact)), key=lambda place: (found[place] - exact[place], place))
    for place in most_cut[: PLACES - sum(found)]:
        found[place] += 1
    if min(found) == 0:
        raise UserError(
            f"weights {', '.join(map(str, weights))}: the smallest is less than a thousandth of all; "
            "leave that corpus out or give it more"
        )
    return tuple(found)


@dataclass(frozen=True)
class Mixture:
    """The order of a mix. Every one of `orders` has a lane for each lane of the mix and takes one sample a lane a step.

    `shares` are thousandths (see `shares`), `global_batch` is that of the mix, a multiple of the lanes.
    """

    orders: tuple[Order, ...]
    shares: tuple[int, ...]
    global_batch: int

    def __post_init__(self) -> None:
        if {(order.lanes, order.global_batch) for order in self.orders} != {(self.lanes, self.lanes)}:
            raise ValueError("every order of a mix takes one sample a lane a step, in the same lanes")
        if self.global_batch % self.lanes or len(self.shares) != len(self.orders) or sum(self.shares) != PLACES:
            raise ValueError("shares and orders, or batch and lanes, do not work out")

    @property
    def lanes(self) -> int:
        """Lanes of the mix."""
        return self.orders[0].lanes

    @property
    def lane_slots(self) -> int:
        """Slots a lane fills in a step."""
        return self.global_batch // self.lanes

    def walk(self, start: int, stop: int, lanes: range | None = None) -> Iterator[list[Portion]]:
        """Yield, for the steps `[start, stop)` of the run, what each takes from each corpus, for some lanes."""
        lanes = range(self.lanes) if lanes is None else lanes
        chunk = max(1, _CHUNK_SLOTS // (len(lanes) * self.lane_slots))
        for first in range(start, stop, chunk):
            yield from self._chunk(first, min(first + chunk, stop), lanes)

    def _chunk(self, start: int, stop: int, lanes: range) -> Iterator[list[Portion]]:
        lane = np.repeat(np.arange(lanes.start, lanes.stop, dtype=np.int64), self.lane_slots)
        turn = np.tile(np.arange(self.lane_slots, dtype=np.int64), len(lanes))
        steps = np.arange(start, stop, dtype=np.int64)
        offset = lane * _GOLDEN_PLACES % PLACES
        place = offset + steps[:, None] * self.lane_slots + turn  # [S, B], where each slot stands in the pattern
        corpus_of = _pattern(self.shares).corpus[place % PLACES]
        found: list[list[Portion]] = [[] for _ in steps]
        for corpus in range(len(self.orders)):
            row, column = np.nonzero(corpus_of == corpus)
            located = self._of_corpus(corpus, lane[column], offset[column], place[row, column])
            slot = lane[column] * self.lane_slots + turn[column]
            bounds = np.searchsorted(row, np.arange(len(steps) + 1))
            for number, step in enumerate(range(start, stop)):
                part = slice(bounds[number], bounds[number + 1])
                if part.start < part.stop:
                    epochs, *fields = (field[part] for field in located)
                    found[number].append(Portion(corpus, Step(0, step, slot[part], *fields), epochs))
        yield from found

    def _of_corpus(self, corpus: int, lane: Ints, offset: Ints, place: Ints) -> tuple[Ints, ...]:
        """Return epoch, sample, run, first, stop and until of one corpus' slots, all `[n]`."""
        order = self.orders[corpus]
        taken = self._before(corpus, place) - self._before(corpus, offset)  # by this lane, of this corpus, until now
        epoch, within = taken // order.full_steps, taken % order.full_steps
        fields = np.empty((6, len(taken)), dtype=np.int64)
        fields[0] = epoch
        for one in np.unique(epoch).tolist():
            here = epoch == one
            sample, run, first, stop, closes = order.locate(one, lane[here], within[here])
            last = one * order.full_steps + closes - 1 + self._before(corpus, offset[here])
            until = (self._place_of(corpus, last) - offset[here]) // self.lane_slots
            fields[1:, here] = sample, one * (order.samples + 1) + run, first, stop, until
        return tuple(fields)

    def _before(self, corpus: int, place: Ints) -> Ints:
        """Return how many of a corpus' samples stand before a place of the endless pattern."""
        counts = _pattern(self.shares).before[corpus]
        found: Ints = place // PLACES * self.shares[corpus] + counts[place % PLACES]
        return found

    def _place_of(self, corpus: int, number: Ints) -> Ints:
        """Return at which place of the endless pattern a corpus' `number`-th sample stands."""
        places = _pattern(self.shares).places[corpus]
        found: Ints = number // self.shares[corpus] * PLACES + places[number % self.shares[corpus]]
        return found


class _Pattern(NamedTuple):
    """The corpus at each place, `[PLACES]`; for each corpus how many stand before each place, and its places."""

    corpus: Ints
    before: list[Ints]
    places: list[Ints]


@functools.lru_cache(maxsize=16)
def _pattern(of: tuple[int, ...]) -> _Pattern:
    # The i-th of a corpus' n samples belongs at (i + 1/2) / n of the pattern; in that order they fill it.
    wanted = [((2 * turn + 1) / (2 * share), corpus) for corpus, share in enumerate(of) for turn in range(share)]
    corpus = np.array([corpus for _, corpus in sorted(wanted)], dtype=np.int64)
    before = [np.concatenate([[0], np.cumsum(corpus == one)[:-1]]) for one in range(len(of))]
    return _Pattern(corpus, before, [np.flatnonzero(corpus == one) for one in range(len(of))])
