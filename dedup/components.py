"""Connected components of an edge list."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def components(size: int, first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return for each of `size` nodes the lowest node of its component; edges are `first[i] - second[i]`.

    Labels fall to the lowest among neighbours and then along themselves until nothing changes (hook and
    jump; Shiloach and Vishkin, "An O(log n) Parallel Connectivity Algorithm", 1982). The outcome does not
    depend on the edges' order.
    """
    label = np.arange(size, dtype=np.int64)
    while True:
        a, b = label[first], label[second]
        low, high = np.minimum(a, b), np.maximum(a, b)
        if (low == high).all():
            return label
        np.minimum.at(label, high, low)
        while True:
            jumped = label[label]
            if (jumped == label).all():
                break
            label = jumped
