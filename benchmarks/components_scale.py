"""What do the connected components of 100 million edges cost, beside scipy's?

Edges come in parts, as workers leave them: from a store of many files, never all in memory. They join random nodes,
half of them into small groups, and one part is a long chain. scipy has all of them in memory at once, in a process of
its own; its components must be ours. Prints one JSON object; ratios above 1 mean less than scipy, or than the limit.

    python benchmarks/components_scale.py [--edges 100000000] [--nodes 100000000] [--parts 100]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dedup.components import components

SEED, CHAIN_SHARE, GROUP = 0, 0.01, 8
LIMIT_S, LIMIT_BYTES = 300.0, 4e9
Edges = npt.NDArray[np.int64]


def write_parts(folder: Path, edges: int, nodes: int, parts: int) -> None:
    """Write the edges, `[2, E]` a part."""
    draw = np.random.default_rng(SEED)
    each = edges // parts
    for number in range(parts):
        first = draw.integers(0, nodes, each)
        second = draw.integers(0, nodes, each)
        grouped = draw.random(each) < 0.9
        second[grouped] = np.minimum(
            first[grouped] // GROUP * GROUP + draw.integers(0, GROUP, grouped.sum()), nodes - 1
        )
        if number == 0:
            chain = draw.permutation(nodes)[: int(each * CHAIN_SHARE) + 2]
            first[: len(chain) - 1], second[: len(chain) - 1] = chain[:-1], chain[1:]
        np.save(folder / f"{number:05d}.npy", np.stack([first, second]))


def read_parts(folder: Path) -> Iterator[tuple[Edges, Edges]]:
    for path in sorted(folder.glob("*.npy")):
        first, second = np.load(path)
        yield first, second


def ours(folder: Path, nodes: int) -> Edges:
    return components(nodes, read_parts(folder))


def scipys(folder: Path, nodes: int) -> Edges:
    first, second = (np.concatenate(side) for side in zip(*read_parts(folder), strict=True))
    graph = coo_array((np.ones(len(first), np.int8), (first, second)), (nodes, nodes)).tocsr()
    _, labels = connected_components(graph, directed=False)
    lowest = np.full(labels.max() + 1, nodes)
    np.minimum.at(lowest, labels, np.arange(nodes))
    return lowest[labels]


def alone(find: Any, folder: Path, nodes: int, out: Path) -> dict[str, float]:
    """Run one side in a process of its own; return its CPU seconds and the peak of its memory."""
    queue: Any = multiprocessing.get_context("spawn").Queue()
    process = multiprocessing.get_context("spawn").Process(target=_side, args=(find, folder, nodes, out, queue))
    process.start()
    result: dict[str, float] = queue.get()
    process.join()
    return result


def _side(find: Any, folder: Path, nodes: int, out: Path, queue: Any) -> None:
    components(2, [(np.array([0]), np.array([1]))])  # what is compiled at first is not measured
    cpu, wall = time.process_time(), time.perf_counter()
    labels = find(folder, nodes)
    spent = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    np.save(out, labels)
    queue.put({**spent, "peak_bytes": peak_bytes, "components": len(np.unique(labels))})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--edges", type=int, default=100_000_000)
    parser.add_argument("--nodes", type=int, default=100_000_000)
    parser.add_argument("--parts", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="components-") as temporary:
        folder = Path(temporary)
        write_parts(folder, options.edges, options.nodes, options.parts)
        our, their = folder / "of" / "ours.npy", folder / "of" / "scipys.npy"
        our.parent.mkdir()
        us = alone(ours, folder, options.nodes, our)
        them = alone(scipys, folder, options.nodes, their)
        equal = bool(np.array_equal(*(np.load(path, mmap_mode="r") for path in (our, their))))
    result = {
        "edges": options.edges, "nodes": options.nodes, "parts": options.parts, "equal": equal,
        "ours": us, "scipy": them,
        "ratio_to_scipy_cpu": them["cpu_s"] / us["cpu_s"],
        "ratio_to_scipy_memory": them["peak_bytes"] / us["peak_bytes"],
        "ratio_to_limit_s": LIMIT_S / us["wall_s"], "ratio_to_limit_memory": LIMIT_BYTES / us["peak_bytes"],
    }  # fmt: skip
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
