"""What would dedup of 400 million samples take, on one node of 64 cores and on ten?

Each method's rate is measured here, on made-up samples, and carried over by how its work grows: pairs of hashes by the
model that chooses their cut (`dedup.hamming.Chunk.nanoseconds`), scaled by what was measured beside it; embeddings by
the multiplications that clusters and neighbours ask for; all else by the sample, the sorts by their comparisons too.
What one process does alone is told apart from what is spread, and is not divided by cores. Cores count as fast as the
one here and busy all the time: hours are a lower bound, to be checked on the cluster with a tenth of the samples.

Shares that a corpus brings along are options, with what LAION-2B is said to hold as defaults. Prints one JSON object;
`ratio_of_pairs` is the measured CPU time of the largest join to what the smaller ones foretold (1 is a sound model).

    python benchmarks/dedup_projection.py [--samples 400000000] [--cores 64] [--measured 1000000]
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import skimage
from PIL import Image

from dedup.batches import Batch, Batches
from dedup.choose import HashGroups, by_hash
from dedup.clusters import TRAINED_ON, Clusters, NearestCentroids, centroids
from dedup.components import components
from dedup.config import DedupConfig
from dedup.confirm import thumbnail
from dedup.detail import most_left, plane
from dedup.hamming import BITS, all_pairs, chunks_for
from dedup.links import settled
from dedup.same_look import THUMBNAIL_PX, WHOLE, same
from dedup.second_look import BATCH_SAMPLES
from dedup.semantic import near_pairs
from dedup.signature import caption_digest
from dedup.text import PERMUTATIONS, Digests, alike, digests
from shards.pdq import pdq

SEED, HASH_BYTES, SIGNATURE_BYTES = 0, BITS // 8, 32 + 32 + 16 + 60
"""Of a sample in the driver: body, hash and caption digests; key, size, place and the rest about 60."""
GROUP_BYTES, PAIR_BYTES = 3 * 8 + 8 + 8 + 4 + 4 + 8, 24 + 8 + 16
"""Of a sample in the driver at the second look: its group, whom it goes for, how far, its component. Of a pair of
hashes: itself, its place among the batches and those of its groups."""
TASK_BYTES = 5 * 8 + 4 + 12 + 28
"""Of a sample, to the worker and back: where it lies, its rank and group; half a pair; the outcome."""
DECODED = 200


@dataclass(frozen=True)
class Cost:
    """What a method asks for: CPU seconds by how far they are spread, and bytes."""

    spread_s: float  # over the cores of all nodes
    alone_s: float = 0.0  # in one process, on one core
    one_node_s: float = 0.0  # over the cores of one node
    driver_bytes: float = 0.0
    node_bytes: float = 0.0
    worker_bytes: float = 0.0
    shuffled_bytes_per_node: float = 0.0
    handed_out_bytes: float = 0.0
    task_bytes: float = 0.0  # of tasks that the driver holds, one a core

    @property
    def cpu_hours(self) -> float:
        return (self.spread_s + self.one_node_s + self.alone_s) / 3600

    def on(self, nodes: int, cores: int) -> dict[str, float]:
        return {
            "hours": (self.spread_s / (nodes * cores) + self.one_node_s / cores + self.alone_s) / 3600,
            "of_which_alone_hours": self.alone_s / 3600,
            "driver_GB": (self.driver_bytes + self.task_bytes * nodes * cores) / 1e9,
            "node_GB": (self.node_bytes + (self.worker_bytes + self.task_bytes) * cores) / 1e9,
            "shuffled_GB": (self.shuffled_bytes_per_node * nodes + self.handed_out_bytes) / 1e9,
        }


def cpu_s(work: Callable[[], object]) -> float:
    before = time.process_time()
    work()
    return time.process_time() - before


def sorts(measured: int, samples: int) -> float:
    """Return how much longer sorting `samples` takes than `measured`."""
    return samples * np.log2(samples) / (measured * np.log2(measured))


def of_signatures(samples: int) -> Cost:
    """Hashes from ingest; the caption's digest is what is computed of each."""
    many = 100_000
    seconds = cpu_s(lambda: [caption_digest(f"A photo of number {at} in the sun") for at in range(many)])
    return Cost(seconds / many * samples, driver_bytes=SIGNATURE_BYTES * samples)


def of_missing_hashes(samples: int, picture: bytes) -> Cost:
    def work() -> None:
        for _ in range(DECODED):
            pdq(Image.open(io.BytesIO(picture)).convert("RGB"))

    return Cost(cpu_s(work) / DECODED * samples)


def of_exact(samples: int, measured: int) -> Cost:
    bodies = np.random.default_rng(SEED).integers(0, 256, (measured, 32), dtype=np.uint8).view("V32").ravel()
    seconds = cpu_s(lambda: np.unique(bodies, return_inverse=True))
    return Cost(0, seconds * sorts(measured, samples), driver_bytes=(32 + 3 * 8) * samples)


def of_hashes(samples: int, measured: int, distance: int) -> tuple[Cost, float]:
    """Return the cost of all pairs of hashes, and how well a quarter of those measured foretold all of them."""
    draw = np.random.default_rng(SEED)
    all_pairs(np.zeros((2, 4), np.uint64), distance)
    took = {}
    for size in (measured // 4, measured):
        hashes = draw.integers(0, 2**64, (size, 4), dtype=np.uint64)
        took[size] = cpu_s(partial(all_pairs, hashes, distance))
    slower = {size: seconds / modelled_s(size, distance) for size, seconds in took.items()}
    chunks = chunks_for(samples, distance)
    sorted_bytes = (HASH_BYTES + 4) * samples + 4 * 2 ** len(chunks[0].bits)
    sorting_s = len(chunks) * samples * 150e-9 * slower[measured]
    cost = Cost(
        modelled_s(samples, distance) * slower[measured] - sorting_s, sorting_s,
        driver_bytes=HASH_BYTES * samples + sorted_bytes, node_bytes=sorted_bytes,
        shuffled_bytes_per_node=len(chunks) * sorted_bytes,
    )  # fmt: skip
    return cost, slower[measured] / slower[measured // 4]


def modelled_s(size: int, distance: int) -> float:
    return sum(chunk.nanoseconds(size) for chunk in chunks_for(size, distance)) * 1e-9


def of_second_look(samples: int, near: float, measured: int, picture: bytes) -> Cost:
    """Thumbnails and detail are made and compared by the workers; the driver groups equal hashes and cuts batches.

    Near samples are taken to come in twos, whose hashes differ; most are copies, and alike at first sight.
    """
    pixels = np.repeat(thumbnail(picture)[None], 2000, axis=0)
    made = cpu_s(lambda: [thumbnail(picture) for _ in range(DECODED)]) / DECODED
    compared = cpu_s(lambda: same(pixels, pixels, DedupConfig().confirm_difference)) / len(pixels)
    whole, nowhere = plane(picture), np.zeros(4, np.float32)
    detailed = cpu_s(lambda: [plane(picture) for _ in range(DECODED)]) / DECODED
    detailed += cpu_s(lambda: [most_left(whole, whole, WHOLE, nowhere) for _ in range(DECODED)]) / DECODED / 2
    everyone, twos = np.arange(measured), round(near / samples * measured / 2)
    hashes = np.random.default_rng(SEED).integers(0, 2**64, (measured, 4), dtype=np.uint64)
    made_groups: list[HashGroups] = []
    grouping = cpu_s(lambda: made_groups.append(by_hash(hashes, everyone, everyone)))
    groups = made_groups[0]
    pairs = np.stack([np.arange(twos), np.arange(twos) + twos, np.full(twos, 8)], axis=1)
    list(Batches(groups, pairs[:2], everyone, None, BATCH_SAMPLES))
    batches: list[Batch] = []
    cutting = cpu_s(lambda: batches.extend(Batches(groups, pairs, everyone, None, BATCH_SAMPLES)))
    deciding = cpu_s(lambda: [settled(batch) for batch in batches]) / (2 * twos)
    return Cost(
        (made + compared / 2 + detailed + deciding) * near, (grouping + cutting) * sorts(measured, samples),
        driver_bytes=GROUP_BYTES * samples + PAIR_BYTES * near / 2,
        worker_bytes=BATCH_SAMPLES * THUMBNAIL_PX**2 * 3, handed_out_bytes=TASK_BYTES * near,
    )  # fmt: skip


def of_components(samples: int, edges: float, measured: int) -> Cost:
    draw = np.random.default_rng(SEED)
    first, second = draw.integers(0, measured, (2, measured))
    components(2, [(first[:0], second[:0])])
    seconds = cpu_s(lambda: components(measured, [(first, second)]))
    return Cost(0, seconds / measured * max(edges, samples), driver_bytes=12 * samples + 24 * edges)


def of_embeddings(samples: int, width: int, neighbours: int) -> Cost:
    """Measured in multiplications a second, of k-means, of the search for clusters and of the products within them.

    K-means is one process' on a node. The driver cuts out what each task compares: a cluster and the vectors near it.
    """
    size = 40_000
    draw = np.random.default_rng(SEED)
    vectors = draw.standard_normal((size, width)).astype(np.float32)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    count, count_then = round(size**0.5), round(samples**0.5)
    middles: list[Any] = []
    training = cpu_s(lambda: middles.append(centroids(vectors, count, SEED)))
    search = NearestCentroids(middles[0], 1 + neighbours)
    nearest: list[Any] = []
    assigning = cpu_s(lambda: nearest.append(search.of(vectors)))
    found = Clusters(nearest[0], count)
    comparing = cpu_s(lambda: [None for _ in near_pairs(vectors, found, 0.95, 2048)])
    cutting = cpu_s(lambda: [vectors[found.part(low, high)[0]] for low, high in found.ranges(size // 8)])
    visited = samples * (1 + neighbours)
    visited_bytes = 2 * width + 8 + 8 + 4 * (1 + neighbours)
    trained, trained_then = (min(n, TRAINED_ON * k) * k for n, k in ((size, count), (samples, count_then)))
    return Cost(
        assigning / (size * count) * samples * count_then
        + comparing / (size * size / count) * samples * samples / count_then,
        cutting / (size * (1 + neighbours)) * visited,
        one_node_s=training / trained * trained_then,
        driver_bytes=samples * (2 * width + (4 + 2 * 8 + 4) * (1 + neighbours)),
        worker_bytes=4 * count_then * width,
        task_bytes=visited / count_then * visited_bytes,
        handed_out_bytes=samples * 2 * width + visited * visited_bytes,
    )


def of_captions(samples: float, measured: int) -> Cost:
    """Read and hashed by the workers, shard by shard; put together by the driver."""
    draw = np.random.default_rng(SEED)
    words = [f"word{number}" for number in range(5000)]
    texts = [" ".join(words[at] for at in draw.integers(0, len(words), 9).tolist()) for _ in range(measured)]
    made: list[Digests] = []
    hashing = cpu_s(lambda: made.append(digests(texts)))
    matching = cpu_s(lambda: alike(made[0], 0.9))
    digest_bytes = made[0].itemsize * PERMUTATIONS
    return Cost(
        hashing / measured * samples, matching * sorts(measured, int(samples)),
        driver_bytes=(digest_bytes + 5 * 8) * samples, handed_out_bytes=(digest_bytes + 12) * samples,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=400_000_000)
    parser.add_argument("--cores", type=int, default=64)
    parser.add_argument("--nodes", type=int, nargs="*", default=[1, 10])
    parser.add_argument("--measured", type=int, default=1_000_000)
    parser.add_argument("--near", type=float, default=0.35, help="share of samples that have a near duplicate")
    parser.add_argument("--captions", type=float, default=0.75, help="share of captions that differ from all others")
    parser.add_argument("--width", type=int, default=512, help="numbers in an embedding")
    options = parser.parse_args()
    data, samples, config = io.BytesIO(), options.samples, DedupConfig()
    Image.fromarray(skimage.data.astronaut()).resize((256, 256)).save(data, "JPEG", quality=90)
    near, picture = options.near * samples, data.getvalue()
    pairs, ratio = of_hashes(samples, options.measured, config.distance)
    costs = {
        "signatures": of_signatures(samples),
        "hashes_where_missing": of_missing_hashes(samples, picture),
        "exact": of_exact(samples, options.measured),
        "near_hashes": pairs,
        "second_look": of_second_look(samples, near, options.measured, picture),
        "components": of_components(samples, near, options.measured),
        "embeddings": of_embeddings(samples, options.width, config.semantic.neighbours),
        "captions": of_captions(options.captions * samples, options.measured // 10),
    }
    result = {
        "samples": samples, "cores": options.cores, "measured": options.measured, "ratio_of_pairs": ratio,
        "cpu_hours": {name: cost.cpu_hours for name, cost in costs.items()},
        "nodes": {
            nodes: {name: cost.on(nodes, options.cores) for name, cost in costs.items()} for nodes in options.nodes
        },
    }  # fmt: skip
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
