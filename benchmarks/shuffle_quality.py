"""How well is an epoch shuffled, beside webdataset's buffer, Streaming's `py1e` and a full random permutation?

1,000 shards of 1,000 samples, indexes alone. Pairmill's own order at three global batches (samples of 30 KB, which
bound the block); webdataset 1.0.2's real shard shuffle and shuffle buffer of 1,000 and 10,000; the real `py1e` with the
range that Streaming takes by default on one node (4 million, here more than the corpus) and on sixteen or more
(262,144). Of every order, in samples as they are served:

- `neighbours`: Pearson correlation of the places in the folder of two samples served one after the other; 0 is best.
- `drift`: Spearman correlation of place in the folder and place in the epoch; 0 is best.
- `spread`, `spread_of_a_shard`: median distance between two samples that are neighbours in the folder, and between two
  of one shard, as a share of the epoch; 0.293 in a full permutation, more is better.
- `shards_in_256`: different shards among 256 samples in a row (a rank's batch, say), in the mean.
- `pairs_in_256`, `pairs_in_4096`: pairs of one shard among so many in a row, times those of a full permutation; 1 is
  as good, less is better. 4,096 in a row are a global batch where Pairmill has one of 4,096.
- `held`: samples in memory (webdataset, Pairmill) or on disk (`py1e`: those of whole shards) at once, as a share.

Prints one JSON object. `full` holds a full permutation; the ratios, above 1 where Pairmill (global batch 4,096) is
better, are against webdataset's buffer of 10,000 and `py1e` with its least range.

    python benchmarks/shuffle_quality.py [--shards 1000] [--samples 1000] [--webdataset FOLDER] [--streaming FOLDER]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from peers import STREAMING_FOLDER, WEBDATASET, WEBDATASET_FOLDER, found, py1e

from shards.order import Order, default_block_samples, default_lanes

Ints = npt.NDArray[np.int64]

SEED, EPOCH = 1, 1
BATCHES, SAMPLE_BYTES = (256, 4096), 30_000
GLOBAL_BATCHES = (256, 4096, 32_768)
COMPARED = 4096
BUFFERS = (1000, 10_000)
RANGES = {"py1e_one_node": 4_000_000, "py1e": 1 << 18}


def pairmill(samples: int, global_batch: int) -> tuple[Ints, float]:
    """Return the order of an epoch, and the share of the corpus in the windows held."""
    lanes = default_lanes(global_batch)
    block = default_block_samples(samples, global_batch, lanes, SAMPLE_BYTES)
    order = Order(samples, global_batch, lanes, block, seed=SEED)
    served = np.concatenate([step.sample for step in order.walk(EPOCH)])
    return served, min(1.0, lanes * order.window_blocks * block / samples)


def webdataset(peer: Path, shards: int, samples: int, buffer: int) -> tuple[Ints, float]:
    """Return the order of an epoch through webdataset's own stages, the shards holding nothing but numbers."""
    sys.path.insert(0, str(found(peer, "webdataset", WEBDATASET)))
    import webdataset as wds

    assert wds.__version__ in WEBDATASET, f"webdataset {wds.__version__} was imported before"

    def expanded(source: Iterator[dict[str, Any]]) -> Iterator[int]:
        for shard in source:
            first = int(shard["url"]) * samples
            yield from range(first, first + samples)

    stream = wds.DataPipeline(
        wds.SimpleShardList([str(shard) for shard in range(shards)]),
        wds.detshuffle(shards, initial=shards, seed=SEED),
        expanded,
        wds.shuffle(buffer, initial=buffer, seed=SEED),
    )
    return np.fromiter(stream, dtype=np.int64), buffer / (shards * samples)


def measures(served: Ints, shards: int) -> dict[str, float]:
    """Return what the module's docstring lists, of the order `served`, `[samples]`."""
    count = len(served)
    of_a_shard = int(served.max() + 1) // shards
    place = np.full(int(served.max()) + 1, -1, dtype=np.int64)
    place[served] = np.arange(count)
    draw = np.random.default_rng(SEED)
    one = draw.integers(0, len(place), 200_000)
    other = one // of_a_shard * of_a_shard + draw.integers(0, of_a_shard, len(one))
    one, other = one[one != other], other[one != other]
    few, many = (_by_shard(served // of_a_shard, shards, batch) for batch in BATCHES)
    return {
        "neighbours": float(np.corrcoef(served[1:], served[:-1])[0, 1]),
        "drift": float(np.corrcoef(served, np.arange(count))[0, 1]),
        "spread": _median_distance(place, np.arange(len(place) - 1), np.arange(1, len(place)), count),
        "spread_of_a_shard": _median_distance(place, one, other, count),
        "shards_in_256": float((few > 0).sum(axis=1).mean()),
        "pairs_in_256": _pairs(few) * (len(place) - 1) / (of_a_shard - 1),
        "pairs_in_4096": _pairs(many) * (len(place) - 1) / (of_a_shard - 1),
    }


def _by_shard(shard: Ints, shards: int, batch: int) -> Ints:
    """Return how many samples of each shard are in each `batch` in a row, `[batches, shards]`."""
    count = len(shard) // batch
    row = np.repeat(np.arange(count) * shards, batch)
    return np.bincount(row + shard[: count * batch], minlength=count * shards).reshape(count, shards)


def _pairs(by_shard: Ints) -> float:
    """Return the share of a batch's pairs that are of one shard, in the mean."""
    batch = int(by_shard[0].sum())
    return float((by_shard * (by_shard - 1)).sum() / (len(by_shard) * batch * (batch - 1)))


def _median_distance(place: Ints, one: Ints, other: Ints, count: int) -> float:
    both = (place[one] >= 0) & (place[other] >= 0)  # a left-over sample has no place
    return float(np.median(np.abs(place[one][both] - place[other][both])) / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=1000, help="of a shard")
    parser.add_argument("--webdataset", type=Path, default=WEBDATASET_FOLDER, help="where pip put webdataset 1.0.2")
    parser.add_argument("--streaming", type=Path, default=STREAMING_FOLDER, help="where pip put mosaicml-streaming")
    given = parser.parse_args()
    shuffle_py1e = py1e(given.streaming)
    samples = given.shards * given.samples
    orders = {f"pairmill_{batch}": pairmill(samples, batch) for batch in GLOBAL_BATCHES}
    for buffer in BUFFERS:
        orders[f"webdataset_{buffer}"] = webdataset(given.webdataset, given.shards, given.samples, buffer)
    sizes = np.full(given.shards, given.samples, dtype=np.int64)
    for name, reach in RANGES.items():
        orders[name] = shuffle_py1e(sizes, 1, SEED, EPOCH, reach), min(1.0, reach / samples)
    orders["full"] = np.random.default_rng(SEED).permutation(samples), 1.0
    result: dict[str, Any] = {}
    for name, (served, held) in orders.items():
        found_here = measures(served, given.shards) | {"held": held}
        result[name] = {what: float(f"{value:.3g}") for what, value in found_here.items()}
    ours, buffered, peer = (result[name] for name in (f"pairmill_{COMPARED}", f"webdataset_{BUFFERS[-1]}", "py1e"))
    for name, theirs in (("webdataset", buffered), ("py1e", peer)):
        result[f"spread_over_{name}"] = round(ours["spread"] / theirs["spread"], 2)
        result[f"{name}_over_pairs_in_4096"] = round(theirs["pairs_in_4096"] / ours["pairs_in_4096"], 2)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
