"""What does the order of 400 million samples cost: how long is a sample, and does memory grow?

Walks stretches at the start, in the middle and near the end of an epoch: all lanes of a global batch of 32,768, then
the part of one of 64 ranks. The simple baseline is numpy's permutation, which has to be held: made here at a tenth
of the size, its memory computed from that for the whole. Prints one JSON object; ratios above 1 mean less than the
limit (1 microsecond of CPU a sample, 32 MB for all that walking takes), or less memory than the baseline.

    python benchmarks/order_speed.py [--samples 400000000] [--stretch 20000000]
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import numpy as np

from shards.order import Order, default_block_samples, default_lanes

GLOBAL_BATCH, SAMPLE_BYTES, RANKS = 32_768, 30_000, 64
EPOCH, SEED = 3, 1
PLACES = (0.0, 0.25, 0.5, 0.75, 0.95)
LIMIT_S, LIMIT_BYTES = 1e-6, 32 * 2**20
WARM_UP_SAMPLES, BASELINE_SHARE = 500_000, 10


def walked(order: Order, stretch: int, lanes: range) -> dict[str, float]:
    """Return CPU seconds a sample, and bytes the peak grows by after a short walk, over `stretch` samples in all."""
    a_step = len(lanes) * order.lane_slots
    steps = max(1, stretch // len(PLACES) // a_step)
    for _ in order.walk(EPOCH, 0, WARM_UP_SAMPLES // a_step, lanes):
        pass
    at_first, started, samples = _peak_bytes(), time.process_time(), 0
    for place in PLACES:
        first = int(place * order.full_steps)
        for step in order.walk(EPOCH, first, first + steps, lanes):
            samples += len(step.sample)
    cpu_s = time.process_time() - started
    return {"samples": samples, "cpu_s": cpu_s / samples, "growth_bytes": _peak_bytes() - at_first}


def first_step_s(order: Order) -> float:
    """Return CPU seconds from nothing to the first step in the middle of an epoch."""
    started = time.process_time()
    next(order.walk(EPOCH + 1, order.full_steps // 2))
    return time.process_time() - started


def permuted(samples: int) -> dict[str, float]:
    """Return CPU seconds a sample and the bytes of a full random permutation."""
    started = time.process_time()
    whole = np.random.default_rng(SEED).permutation(samples)
    return {"cpu_s": (time.process_time() - started) / samples, "bytes": whole.nbytes}


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=400_000_000)
    parser.add_argument("--stretch", type=int, default=20_000_000)
    given = parser.parse_args()
    lanes = default_lanes(GLOBAL_BATCH)
    block = default_block_samples(given.samples, GLOBAL_BATCH, lanes, SAMPLE_BYTES)
    order = Order(given.samples, GLOBAL_BATCH, lanes, block, seed=SEED)
    before = _peak_bytes()
    all_lanes = walked(order, given.stretch, range(lanes))
    one_rank = walked(order, given.stretch // RANKS, range(lanes // RANKS))
    first_s = first_step_s(order)
    held = max(1, _peak_bytes() - before)
    baseline = permuted(given.samples // BASELINE_SHARE)
    baseline_bytes = int(baseline["bytes"]) * BASELINE_SHARE
    slowest = max(all_lanes["cpu_s"], one_rank["cpu_s"])
    result = {
        "samples": given.samples,
        "lanes": lanes,
        "block_samples": block,
        "walked": all_lanes["samples"],
        "cpu_us_a_sample": round(all_lanes["cpu_s"] * 1e6, 3),
        "cpu_us_a_sample_of_one_rank": round(one_rank["cpu_s"] * 1e6, 3),
        "first_step_cpu_ms": round(first_s * 1e3, 1),
        "held_bytes": held,
        "of_which_after_warm_up": max(all_lanes["growth_bytes"], one_rank["growth_bytes"]),
        "permutation_bytes": baseline_bytes,
        "permutation_cpu_us_a_sample_at_a_tenth": round(baseline["cpu_s"] * 1e6, 3),
        "permutation_first_step_cpu_s": round(baseline["cpu_s"] * given.samples, 2),
        "limit_over_cpu": round(LIMIT_S / slowest, 1),
        "limit_over_held": round(LIMIT_BYTES / held, 1),
        "permutation_over_held": round(baseline_bytes / held),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
