"""How many samples a second does one card train on, synthetic and from shards, and beside open_clip?

For each model, in one process: `synthetic`, the trainer's own step on one batch that stays on the card; `fed`, the same
step on batches from shards of photographs (256 px, random crop, loader processes on this machine's cores); `open_clip`,
its model compiled, its loss, and AdamW fused as ours is, on the same synthetic batch. bfloat16 where the device has it.
Prints MFU by the card's peak. Where there is no card it runs on the CPU, where small models and batches make sense:

    python benchmarks/train_card.py [--models ViT-B-32 ViT-B-16 ViT-L-14] [--batch 1024 512 256] [--steps 50]
    python benchmarks/train_card.py --models ViT-nano --batch 16 --steps 2 --samples 64 --without-open-clip
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import peers
import torch
from loader_throughput import write_shards
from torch import nn

from infra.config import parse
from infra.storage import Folder
from train.config import RunConfig
from train.data import Batch
from train.flops import flops_a_sample, peak_flops
from train.launch import prepare
from train.loop import train_step
from train.model import create_model
from train.state import TrainingState, build

DEFAULT_BATCH = {"ViT-B-32": 1024, "ViT-B-16": 512, "ViT-L-14": 256}
WARM_UP_STEPS = 5
"""Steps that compile, fill caches and set the allocator up; not counted."""


def configuration(name: str, batch: int, shards: str, given: argparse.Namespace) -> RunConfig:
    """Return a run as the recipes have it, on one card."""
    model = create_model(name, device=torch.device("meta"))
    return parse(
        {
            "length": "1000000 steps",
            "data": {
                "folder": shards, "global_batch_size": batch, "image_size": model.image_size or 224,
                "decoder": "turbo", "pad_to": "context", "workers": given.workers, "cache_bytes": 0,
            },
            "tokenizer": {"kind": "clip"},
            "model": {"name": name},
            "augment": {"crop_scale": [0.9, 1.0]},
            "parallel": {"precision": "auto", "compile": given.compile},
        },
        RunConfig,
        source="benchmark",
    )  # fmt: skip


def timed(batches: Iterable[Any], step: Callable[[Any], object], steps: int) -> float:
    """Return seconds of a step, the median of thirds of `steps`, after the warm-up."""
    coming = iter(batches)
    for batch in itertools.islice(coming, WARM_UP_STEPS):
        step(batch)
    parts = []
    for _ in range(3):
        _synchronise()
        begun = time.perf_counter()
        for batch in itertools.islice(coming, max(1, steps // 3)):
            step(batch)
        _synchronise()
        parts.append((time.perf_counter() - begun) / max(1, steps // 3))
    return sorted(parts)[1]


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def of_open_clip(name: str, state: TrainingState, batch: Batch, given: argparse.Namespace) -> float:
    """Return seconds of a step of open_clip's on the same pairs."""
    model: nn.Module = peers.open_clip_model(given.open_clip, name).to(state.device).train()
    loss_of = importlib.import_module("open_clip.loss").ClipLoss(cache_labels=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.2, fused=True)
    run: Any = torch.compile(model) if given.compile else model
    images = torch.randn(batch.images.shape, device=state.device)
    tokens = batch.tokens.to(state.device)

    def step(_: None) -> None:
        optimizer.zero_grad()
        with torch.autocast(state.device.type, state.dtype, enabled=state.dtype != torch.float32):
            loss = loss_of(*run(images, tokens)[:3])
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)  # type: ignore[operator]

    return timed(itertools.repeat(None), step, given.steps)


def measure(name: str, batch: int, shards: str, work: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Return samples a second of each side, what they are to each other, and MFU."""
    config, run = configuration(name, batch, shards, given), work / f"run-{name}"
    prepare(config, run, 1)
    state = build(config, run)
    state.parallel.train()
    first = next(iter(state.data))
    side, length = first.images.shape[-1], first.tokens.shape[1]
    on_device = Batch(first.images.to(state.device), first.tokens.to(state.device), first.numbers.to(state.device),
                      first.keys, first.skipped, first.state)  # fmt: skip
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    spent = {"synthetic": timed(itertools.repeat(on_device), lambda one: train_step(state, one), given.steps)}
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    spent["fed"] = timed(state.data, lambda one: train_step(state, one), given.steps)
    if not given.without_open_clip:
        spent["open_clip"] = of_open_clip(name, state, first, given)
    speed = {who: batch / seconds for who, seconds in spent.items()}
    peak = peak_flops(state.device, state.dtype, given.peak)
    needed = flops_a_sample(config, state.data.tokenizer.vocabulary, side, length)
    return {
        "batch": batch,
        "text_tokens": length,
        "a_second": {who: round(value, 1) for who, value in speed.items()},
        "fed_share_of_synthetic": round(speed["fed"] / speed["synthetic"], 3),
        "times_open_clip": round(speed["synthetic"] / speed["open_clip"], 3) if "open_clip" in speed else None,
        "gflops_a_sample": round(needed / 1e9, 2),
        "mfu": round(speed["synthetic"] * needed / peak, 3) if peak else None,
        "memory_bytes": memory,
    }


def _loaders() -> int:
    """Return how many loader processes the cores are enough for: a power of two, which divides the lanes."""
    spare = len(os.sched_getaffinity(0)) - 2
    return 1 << spare.bit_length() - 1 if spare > 0 else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(DEFAULT_BATCH), help="open_clip's names")
    parser.add_argument("--batch", type=int, nargs="+", default=[], help="pairs of a step, for each model")
    parser.add_argument("--steps", type=int, default=48, help="counted steps")
    parser.add_argument("--samples", type=int, default=4096, help="of the shards that feed it")
    parser.add_argument("--workers", type=int, default=_loaders())
    parser.add_argument("--peak", type=float, default=0.0, help="FLOP/s of the device, where it is not in the table")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--without-open-clip", action="store_true")
    parser.add_argument("--open-clip", type=Path, default=peers.OPEN_CLIP_FOLDER, help=f"folder with {peers.OPEN_CLIP}")
    given = parser.parse_args()
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    results: dict[str, Any] = {"card": card, "torch": torch.__version__}
    with tempfile.TemporaryDirectory(prefix="pairmill-bench-") as name:
        write_shards(Folder(f"{name}/shards"), given.samples, Path(name))
        sizes = given.batch or [DEFAULT_BATCH.get(model, 256) for model in given.models]
        for model, batch in zip(given.models, sizes, strict=True):
            results[model] = measure(model, batch, f"{name}/shards", Path(name), given)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
