"""What do all pairs of 256-bit hashes within a Hamming distance cost, beside faiss' binary indexes?

Hashes are random, with planted pairs at every distance from 0 to the limit. At `--peer-size`, which all can do, the
same hashes go through faiss' exhaustive `IndexBinaryFlat` and its `IndexBinaryMultiHash`, both by range search, the
latter with tables and flips that miss nothing; at `--size` through Pairmill's own alone. Every side has the same number
of threads. Prints one JSON object; ratios are the peer's CPU seconds to ours, and the limit's to ours.

    PYTHONPATH=DIR_WITH_FAISS python benchmarks/hamming_pairs.py [--size 4000000] [--peer-size 200000] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from dedup.hamming import BITS, all_pairs, chunks_for

DISTANCE, SEED = 31, 0
LIMIT_CPU_S, LIMIT_BYTES = 600.0, 4e9
MULTI_HASH_BITS, MULTI_HASH_TABLES, MULTI_HASH_FLIPS = 16, 16, 1
"""16 tables of 16 bits, one flip: of 31 bits spread over 16 parts one part has 1 at most, so nothing is missed."""
Hashes = npt.NDArray[np.uint64]
Planted = set[tuple[int, int]]


def planted(size: int, pairs: int) -> tuple[Hashes, Planted]:
    """Return `size` random hashes `[size, 4]` and the places of those that were made near each other."""
    draw = np.random.default_rng(SEED)
    hashes = draw.integers(0, 2**64, (size, BITS // 64), dtype=np.uint64)
    places = draw.permutation(size)[: 2 * pairs].reshape(-1, 2)
    for one, other in places:
        bits = np.unpackbits(hashes[one].view(np.uint8))
        bits[draw.choice(BITS, draw.integers(0, DISTANCE + 1), replace=False)] ^= 1
        hashes[other] = np.packbits(bits).view(np.uint64)
    return hashes, {(min(pair), max(pair)) for pair in places.tolist()}


def measured(find: Callable[[], Planted], expected: Planted) -> dict[str, Any]:
    """Return what `find` took, and which share of the expected pairs it found."""
    cpu, wall = time.process_time(), time.perf_counter()
    found = find()
    return {
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - wall,
        "recall": len(found & expected) / len(expected),
        "pairs": len(found),
    }


def ours(hashes: Hashes, threads: int) -> Planted:
    return set(map(tuple, all_pairs(hashes, DISTANCE, threads)[:, :2].tolist()))


def by_faiss(index: Any, hashes: Hashes) -> Planted:
    """Return the pairs of a range search of all hashes among themselves."""
    codes = hashes.view(np.uint8).reshape(len(hashes), -1)
    index.add(codes)
    limits, _, found = index.range_search(codes, DISTANCE + 1)  # its radius is exclusive
    query = np.repeat(np.arange(len(hashes)), np.diff(limits.astype(np.int64)))
    return {(one, other) for one, other in zip(query.tolist(), found.tolist(), strict=True) if one < other}


def multi_hash() -> Any:
    index = faiss.IndexBinaryMultiHash(BITS, MULTI_HASH_TABLES, MULTI_HASH_BITS)
    index.nflip = MULTI_HASH_FLIPS
    return index


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=4_000_000)
    parser.add_argument("--peer-size", type=int, default=200_000)
    parser.add_argument("--planted", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    faiss.omp_set_num_threads(options.threads)
    all_pairs(np.zeros((2, 4), np.uint64), DISTANCE)  # what is compiled at first is not measured
    few, expected = planted(options.peer_size, min(options.planted, options.peer_size // 4))
    beside = {
        "ours": measured(lambda: ours(few, options.threads), expected),
        "faiss_flat": measured(lambda: by_faiss(faiss.IndexBinaryFlat(BITS), few), expected),
        "faiss_multi_hash": measured(lambda: by_faiss(multi_hash(), few), expected),
    }
    many, expected = planted(options.size, options.planted)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    whole = measured(lambda: ours(many, options.threads), expected)
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {
        "size": options.size, "distance": DISTANCE, "threads": options.threads,
        "chunks": len(chunks_for(options.size, DISTANCE)), **whole,
        "peak_bytes": peak_bytes, "peak_before_bytes": before * 1024,
        "ratio_to_limit_cpu": LIMIT_CPU_S / whole["cpu_s"], "ratio_to_limit_memory": LIMIT_BYTES / peak_bytes,
        "peer_size": options.peer_size, "beside": beside,
        "ratio_to_faiss_flat": beside["faiss_flat"]["cpu_s"] / beside["ours"]["cpu_s"],
        "ratio_to_faiss_multi_hash": beside["faiss_multi_hash"]["cpu_s"] / beside["ours"]["cpu_s"],
    }  # fmt: skip
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
