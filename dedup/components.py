"""Connected components of an edge list of any length, in memory that grows with the nodes alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

Nodes = npt.NDArray[np.int64]


class Components:
    """The components of edges that come in any number of parts, in any order: the outcome is the same.

    Each node points to a lower one of its component or to itself (union by least node, with path halving; Tarjan and
    van Leeuwen, "Worst-case Analysis of Set Union Algorithms", 1984, section 3), 4 bytes a node up to 2^32 of them.
    """

    def __init__(self, size: int) -> None:
        """Begin with `size` nodes, each a component of its own."""
        self._lower: npt.NDArray[Any] = np.arange(size, dtype=np.uint32 if size < 2**32 else np.int64)

    def join(self, first: npt.NDArray[np.integer], second: npt.NDArray[np.integer]) -> None:
        """Add the edges `first[i] - second[i]`.

        Raises:
            ValueError: an edge names a node that is not there.
        """
        for side in (first, second):
            if len(side) and not 0 <= int(side.min()) <= int(side.max()) < len(self._lower):
                raise ValueError(f"nodes {side.min()} to {side.max()} of {len(self._lower)}: an edge leads nowhere")
        _join(self._lower, first, second)

    def forest(self) -> tuple[Nodes, Nodes]:
        """Return edges that make the same components, one for each node that is not the lowest of its own."""
        nodes = np.flatnonzero(self._lower != np.arange(len(self._lower), dtype=self._lower.dtype))
        return nodes, self._lower[nodes].astype(np.int64)

    def labels(self) -> Nodes:
        """Return for each node the lowest of its component, `[nodes]`."""
        _flatten(self._lower)
        return self._lower.astype(np.int64)


def components(size: int, edges: Iterable[tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]]]) -> Nodes:
    """Return for each of `size` nodes the lowest node of its component; `edges` are parts of `first[i] - second[i]`."""
    found = Components(size)
    for first, second in edges:
        found.join(first, second)
    return found.labels()


@njit(nogil=True, cache=True)
def _join(lower: npt.NDArray[np.integer], first: npt.NDArray[np.integer], second: npt.NDArray[np.integer]) -> None:
    for edge in range(len(first)):
        a, b = first[edge], second[edge]
        while lower[a] != a:
            lower[a] = lower[lower[a]]
            a = lower[a]
        while lower[b] != b:
            lower[b] = lower[lower[b]]
            b = lower[b]
        if a < b:
            lower[b] = a
        elif b < a:
            lower[a] = b


@njit(nogil=True, cache=True)
def _flatten(lower: npt.NDArray[np.integer]) -> None:
    for node in range(len(lower)):  # a node points to a lower one, which is flat by now
        lower[node] = lower[lower[node]]
