"""What do the pairs cost that the report shows at dedup's thresholds, beside the pairs that dedup needs anyway?

Random 256-bit hashes: the drawn ones joined with all up to 8 bits beyond the distance, and all pairs within it, in the
same run. Random unit vectors: the drawn ones compared with all, and k-means with the pairs inside clusters. CPU seconds
of one thread. Prints one JSON object; `hash_ratio` and `embedding_ratio` are how many times as much the stage's own
pairs take.

    python benchmarks/threshold_sheet.py [--hashes 4000000] [--embeddings 200000] [--width 64] [--sheet 2000]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any

SEED = 0
WARM = 1000
"""Hashes joined before anything is measured, so that the compiled loops are there."""


def cpu_s(work: Callable[[], Any]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def of_hashes(size: int, sheet: int) -> dict[str, float]:
    """Return the CPU seconds of both joins of `size` hashes."""
    import numpy as np

    from dedup.choose import by_hash
    from dedup.config import DedupConfig
    from dedup.hamming import all_pairs
    from dedup.thresholds import at_distance
    from infra.cluster import ClusterConfig

    config, one = DedupConfig(sheet=sheet), ClusterConfig(cpus=1)
    hashes = np.random.default_rng(SEED).integers(0, 2**64, (size, 4), dtype=np.uint64)
    everyone = np.arange(size)
    few = by_hash(hashes, everyone[:WARM], everyone)
    at_distance(few, config, one)
    all_pairs(few.hashes, config.distance)
    groups = by_hash(hashes, everyone, everyone)
    return {
        "sheet": cpu_s(lambda: at_distance(groups, config, one)),
        "pairs": cpu_s(lambda: all_pairs(groups.hashes, config.distance)),
    }


def of_embeddings(size: int, width: int, sheet: int) -> dict[str, float]:
    """Return the CPU seconds of both comparisons of `size` vectors."""
    import numpy as np

    from dedup.clusters import cluster, load_faiss
    from dedup.config import DedupConfig
    from dedup.embeddings import Embeddings
    from dedup.semantic import near_pairs
    from dedup.thresholds import at_cosine

    load_faiss()
    config = DedupConfig(sheet=sheet)
    semantic = config.semantic
    vectors = np.random.default_rng(SEED).standard_normal((size, width), dtype=np.float32)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    embeddings = Embeddings(vectors, np.ones(size, bool))

    def pairs() -> None:
        clusters = cluster(vectors, semantic.clusters, semantic.neighbours, semantic.seed)
        for _ in near_pairs(vectors, clusters, semantic.threshold, semantic.block):
            pass

    return {"sheet": cpu_s(lambda: at_cosine(embeddings, np.arange(size), config)), "pairs": cpu_s(pairs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hashes", type=int, default=4_000_000)
    parser.add_argument("--embeddings", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--sheet", type=int, default=2000)
    options = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"  # read as numpy and faiss are loaded, which is why that comes after
    hashes = of_hashes(options.hashes, options.sheet)
    embeddings = of_embeddings(options.embeddings, options.width, options.sheet)
    result = {
        **vars(options),
        "hash_cpu_s": hashes, "hash_us_a_sample": 1e6 * hashes["sheet"] / options.hashes,
        "hash_ratio": hashes["pairs"] / hashes["sheet"],
        "embedding_cpu_s": embeddings, "embedding_ratio": embeddings["pairs"] / embeddings["sheet"],
    }  # fmt: skip
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
