"""What the stage's totals say of how far duplicates lie apart, and of how samples hang together: of bounded size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dedup.outcome import EXACT, PERCEPTUAL, SEMANTIC

LARGEST, KEYS = 10, 8
"""Components that are told of one by one, and samples that are named of each."""
GIANT_SHARE, GIANT_SAMPLES = 0.01, 100
"""A component of more than both of all samples is a giant."""
COSINE_STEP = 0.005


def statistics(
    keys: npt.NDArray[np.str_], component: npt.NDArray[np.int64], removed: pa.Table
) -> dict[str, dict[str, int] | list[dict[str, Any]]]:
    """Return what the totals hold beside the counts.

    Args:
        keys: of all `N` samples.
        component: `[N]`, the lowest sample of each one's component; those that stay count too.
        removed: `removed.parquet`.

    Returns:
        `distances` (bits: how many went as `perceptual` at that distance), `cosines` (the lower end of a step of 0.005:
        how many went as `semantic`), `component_sizes` (`2`, `3-4`, `5-8`, …: how many components), and of each of
        the `largest_components` its `component` (the lowest key as a number), `size`, `methods` (how many went by
        which) and `keys` (of a few of its samples, evenly chosen).
    """
    sizes = np.bincount(component, minlength=1)
    return {
        "distances": _counted(removed["distance"].filter(pc.equal(removed["method"], PERCEPTUAL))),
        "cosines": _steps(removed["cosine"].filter(pc.equal(removed["method"], SEMANTIC))),
        "component_sizes": _by_size(sizes),
        "largest_components": [_told(keys, component, int(one), removed) for one in _largest(sizes)],
    }


def giant(totals: Mapping[str, Any]) -> str:
    """Return what it means that the largest component holds far too many samples, if so, and how to mend it."""
    largest, rows = (totals.get("largest_components") or [{}])[0], rows_found(totals)
    size = largest.get("size", 0)
    if size <= GIANT_SAMPLES or size <= GIANT_SHARE * rows:
        return ""
    methods = {name: largest["methods"].get(name, 0) for name in (PERCEPTUAL, SEMANTIC, EXACT)}
    most = max(methods, key=lambda name: methods[name])
    return f"one component holds {size:,} of {rows:,} samples ({100 * size / rows:.3g}%): {_MENDS[most]}"


def rows_found(totals: Mapping[str, Any]) -> int:
    """Return how many samples dedup went over: `rows_in` counts none that were taken down since."""
    return int(totals.get("rows_in", 0)) + int(totals.get("taken_down", 0))


_MENDS = {
    PERCEPTUAL: "a giant component is the sign of a bad threshold; choose a lower --distance, and leave --confirm on",
    SEMANTIC: "a giant component is the sign of a bad threshold; choose a higher --semantic.threshold",
    EXACT: "nearly all of them have the same body, so it is likely a placeholder that hosts send in place of pictures; "
    "no threshold joins those",
}


def without(largest: Iterable[Mapping[str, Any]], keys: set[str]) -> list[dict[str, Any]]:
    """Return `largest_components` in which none of these keys is named."""
    return [{**one, "keys": [key for key in one["keys"] if key not in keys]} for one in largest]


def _counted(values: pa.ChunkedArray) -> dict[str, int]:
    numbers, counts = np.unique(values.to_numpy(), return_counts=True)
    return {str(number): count for number, count in zip(numbers.tolist(), counts.tolist(), strict=True)}


def _steps(cosines: pa.ChunkedArray) -> dict[str, int]:
    # A threshold is a round number, and the cosine of what lies on it rounds to either side of it in 32 bits.
    steps = np.floor(cosines.drop_null().to_numpy().astype(np.float64) / COSINE_STEP + 1e-4).astype(np.int64)
    numbers, counts = np.unique(steps, return_counts=True)
    return {
        f"{number * COSINE_STEP:.3f}": count for number, count in zip(numbers.tolist(), counts.tolist(), strict=True)
    }


def _by_size(sizes: npt.NDArray[np.int64]) -> dict[str, int]:
    ends = 2 ** np.arange(1, 63)
    counts = np.bincount(np.searchsorted(ends, sizes[sizes > 1]))
    names = ["2", *(f"{low + 1}-{high}" for low, high in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True))]
    return {names[place]: int(counts[place]) for place in np.flatnonzero(counts).tolist()}


def _largest(sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    several = np.flatnonzero(sizes > 1)
    if len(several) > LARGEST:
        least = np.partition(sizes[several], -LARGEST)[-LARGEST]
        several = several[sizes[several] >= least]
    largest: npt.NDArray[np.int64] = several[np.argsort(-sizes[several], kind="stable")[:LARGEST]]
    return largest


def _told(keys: npt.NDArray[np.str_], component: npt.NDArray[np.int64], one: int, removed: pa.Table) -> dict[str, Any]:
    members = np.flatnonzero(component == one)
    shown = members[np.unique(np.linspace(0, len(members) - 1, KEYS).astype(np.int64))]
    number = int(keys[one])
    methods = pc.value_counts(removed["method"].filter(pc.equal(removed["component"], number)))
    counts = {method["values"].as_py(): method["counts"].as_py() for method in methods}
    return {
        "component": number, "size": len(members), "methods": dict(sorted(counts.items())),
        "keys": keys[shown].tolist(),
    }  # fmt: skip
