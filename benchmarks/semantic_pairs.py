"""What do pairs of embeddings over a cosine cost by clusters, and how many are missed, beside all pairs?

Unit vectors in float16 about random centres, as those of pictures lie about what is in them, and planted pairs whose
cosines are even over a range around the threshold. By clusters: equal vectors put together, k-means and the pairs of
each vector's own and nearest clusters. Beside it every pair by blocked matrix products in float32, in the same run, on
the same number of threads. Prints one JSON object; `ratio_to_limit` is the CPU seconds that 10% of all pairs take to
ours, and `recall` the share of all pairs at or over the threshold that is found.

    python benchmarks/semantic_pairs.py [--size 200000] [--width 64] [--neighbours N] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

THRESHOLD, BLOCK, SEED = 0.95, 2048, 0
CENTRES, SPREAD = 1000, 0.7
PLANTED_SHARE, PLANTED_COSINES = 0.05, (0.93, 0.99)
WANTED_RECALL, CPU_SHARE = 0.99, 0.1


def embeddings(size: int, width: int) -> Any:
    """Return unit vectors `[size, width]`, float16."""
    import numpy as np

    def unit(rows: Any) -> Any:
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    draw = np.random.default_rng(SEED)
    centres = unit(draw.standard_normal((CENTRES, width)))
    noise = draw.standard_normal((size, width)) / np.sqrt(width)
    vectors = unit(centres[draw.integers(0, CENTRES, size)] + SPREAD * noise)
    pairs = draw.permutation(size)[: 2 * int(PLANTED_SHARE * size)].reshape(-1, 2)
    one = vectors[pairs[:, 0]]
    away = draw.standard_normal(one.shape)
    away = unit(away - (away * one).sum(axis=1, keepdims=True) * one)
    cosine = draw.uniform(*PLANTED_COSINES, len(pairs))[:, None]
    vectors[pairs[:, 1]] = cosine * one + np.sqrt(1 - cosine**2) * away
    return vectors.astype(np.float16)


def measured(find: Callable[[], Any]) -> tuple[Any, float]:
    """Return pairs as sorted numbers, and the CPU seconds that they took."""
    started = time.process_time()
    found = find()
    return found, time.process_time() - started


def by_clusters(vectors: Any, neighbours: int) -> Any:
    import numpy as np

    from dedup.clusters import cluster
    from dedup.semantic import all_pairs, equal

    leaders = np.unique(equal(vectors, np.arange(len(vectors))))
    some = vectors[leaders]
    pairs = all_pairs(some, cluster(some, 0, neighbours, SEED), THRESHOLD, BLOCK)
    return leaders[pairs.first] * len(vectors) + leaders[pairs.second]


def by_brute_force(vectors: Any) -> Any:
    import numpy as np

    whole, size, found = vectors.astype(np.float32), len(vectors), []
    for at in range(0, size, BLOCK):
        for start in range(at, size, BLOCK):
            right = whole[start : start + BLOCK]
            hits = np.flatnonzero((whole[at : at + BLOCK] @ right.T).ravel() >= THRESHOLD)
            row, column = np.divmod(hits, len(right))
            is_new = at + row < start + column
            found.append((at + row[is_new]) * size + start + column[is_new])
    return np.sort(np.concatenate(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--neighbours", type=int)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(options.threads)  # read as numpy and faiss are loaded, which is why that comes after

    import numpy as np

    from dedup.clusters import load_faiss
    from dedup.config import SemanticConfig

    neighbours = SemanticConfig().neighbours if options.neighbours is None else options.neighbours
    load_faiss()
    vectors = embeddings(options.size, options.width)
    ours, ours_s = measured(lambda: by_clusters(vectors, neighbours))
    every, every_s = measured(lambda: by_brute_force(vectors))
    common = np.intersect1d(ours, every)
    recall = len(common) / max(1, len(every))
    result = {
        "size": options.size, "width": options.width, "threshold": THRESHOLD, "neighbours": neighbours,
        "threads": options.threads, "pairs": len(every), "found": len(common), "only_ours": len(ours) - len(common),
        "recall": recall, "cpu_s": ours_s, "brute_force_cpu_s": every_s, "cpu_share": ours_s / every_s,
        "ratio_to_limit": CPU_SHARE * every_s / ours_s,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if recall < WANTED_RECALL:
        sys.exit(f"{recall:.2%} of the pairs found, {WANTED_RECALL:.0%} wanted")


if __name__ == "__main__":
    main()
