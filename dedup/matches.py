"""Which samples match which test pictures: of each suite and sample the closest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dedup.choose import Indices
from dedup.suites import Suites

_FEWEST_HELD = 1 << 20


@dataclass(frozen=True)
class Matches:
    """For each suite and each sample that shows one of its pictures the closest picture: `M` of them."""

    sample: Indices  # [M], rising
    suite: npt.NDArray[np.int64]  # [M]
    picture: Indices  # [M]
    gap: npt.NDArray[np.float32]  # [M], how far apart: bits, or what a cosine lacks to 1
    has_copy: npt.NDArray[np.bool_]  # [F], test pictures with any match
    has_copy_left: npt.NDArray[np.bool_]  # [F], those with one among the samples that stay

    def closest(self) -> Matches:
        """Return of each sample the closest picture of all suites."""
        order = np.lexsort((self.picture, self.gap, self.sample))
        order = order[_is_first(self.sample[order])]
        return Matches(
            self.sample[order], self.suite[order], self.picture[order], self.gap[order],
            self.has_copy, self.has_copy_left,
        )  # fmt: skip


class MatchKeeper:
    """Takes matches in parts, in any order."""

    def __init__(self, suites: Suites, stays: npt.NDArray[np.bool_] | None = None) -> None:
        """`stays` `[N]` tells of the samples which are still in the corpus; by default all."""
        self._suite, self._stays = suites.suite.astype(np.int64), stays
        self._count, self._room = 0, _FEWEST_HELD
        self._held = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))]
        self.has_copy, self.has_copy_left = np.zeros(len(suites), bool), np.zeros(len(suites), bool)

    def add(self, picture: Indices, sample: Indices, gap: npt.NDArray[np.number]) -> None:
        """Take in that `picture[i]` matches `sample[i]`, so far apart."""
        self.has_copy[picture] = True
        self.has_copy_left[picture if self._stays is None else picture[self._stays[sample]]] = True
        self._held.append((picture, sample, gap.astype(np.float32)))
        self._count += len(picture)
        if self._count > self._room:
            self._held = [self._best()]
            self._count = len(self._held[0][0])
            self._room = max(_FEWEST_HELD, 2 * self._count)

    def matches(self) -> Matches:
        """Return what has been taken in."""
        picture, sample, gap = self._best()
        return Matches(sample, self._suite[picture], picture, gap, self.has_copy, self.has_copy_left)

    def _best(self) -> tuple[Indices, Indices, npt.NDArray[np.float32]]:
        picture, sample, gap = (np.concatenate(column) for column in zip(*self._held, strict=True))
        suite = self._suite[picture]
        order = np.lexsort((picture, gap, suite, sample))
        order = order[_is_first(sample[order]) | _is_first(suite[order])]
        return picture[order], sample[order], gap[order]


def _is_first(values: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
    """Tell of sorted values which differ from the one before."""
    return np.diff(values, prepend=values[:1] - 1) != 0
