"""How long does the training loop stand still for a checkpoint?

ViT-B/16 with CLIP's vocabulary (150 million parameters and AdamW's two moments in float32, 1.8 GB) is trained for some
steps on tiny shards, with a checkpoint after each: first asynchronously, then with the loop waiting for the disk. The
pause is what `Saver.save` and the wait in `optimizer.step` take together; the first asynchronous one also fills new
buffers. Beside it: one copy of as many bytes by one thread, which is the least that a copy could take, and what a step
takes alone and while a checkpoint is copied and written. Prints one JSON object; ratios above 1 are good.

    python benchmarks/checkpoint_pause.py [--model ViT-B-16] [--batch 2] [--checkpoints 4] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

LIMIT_S = 1.0


def prepared(folder: Path, model: str, batch: int, asynchronous: bool) -> Any:
    """Return a run at its beginning, in `folder`."""
    from infra.config import parse
    from train.config import RunConfig
    from train.launch import prepare
    from train.models import sizes_of
    from train.state import build

    sizes = sizes_of(model)
    side = getattr(sizes.vit or sizes.resnet, "image_size", 64)

    raw = {
        "length": "1000 steps",
        "data": {"folder": str(folder / "corpus"), "global_batch_size": batch, "image_size": side},
        "tokenizer": {"kind": "clip"},
        "model": {"name": model},
        "parallel": {"precision": "float32"},
        "checkpoint": {"keep": 1, "asynchronous": asynchronous},
    }
    run = folder / ("asynchronous" if asynchronous else "synchronous")
    config = parse(raw, RunConfig, source="benchmark")
    prepare(config, run, 1)
    return build(config, run), run


def measured(folder: Path, model: str, batch: int, checkpoints: int, asynchronous: bool) -> dict[str, Any]:
    """Train with a checkpoint after each step; return the pauses and the times of steps, in seconds."""
    from train.checkpoint import Saver
    from train.loop import train_step

    state, run = prepared(folder, model, batch, asynchronous)
    batches = iter(state.data)
    alone, beside, pauses, written = [], [], [], []
    with Saver(state, run) as saver:
        train_step(state, next(batches))  # makes the moments
        for _ in range(checkpoints):
            alone.append(_seconds(lambda: train_step(state, next(batches))))
            before, started = saver.pause_s, time.perf_counter()
            saver.save()
            beside.append(_seconds(lambda: train_step(state, next(batches))))
            pauses.append(saver.pause_s - before)
            saver.wait()
            written.append(time.perf_counter() - started)
    batches.close()
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.tensors().values())
    parameters = sum(parameter.numel() for parameter in state.model.parameters())
    return {"pause_s": pauses, "written_s": written, "step_s": alone, "step_beside_s": beside} | {
        "bytes": size, "parameters": parameters
    }  # fmt: skip


def copy_s(size: int) -> float:
    """Return the seconds of a copy of so many bytes from one buffer into another that is in use already."""
    source, target = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    return min(_seconds(lambda: target.copy_(source)) for _ in range(3))


def _seconds(act: Any) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-16", help="a name that create_model knows")
    parser.add_argument("--batch", type=int, default=2, help="samples of a step: the fewer, the less time to copy in")
    parser.add_argument("--checkpoints", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where checkpoints go; a temporary one by default")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pairmill-bench-", dir=given.folder) as name:
        from tiny_shards import tiny_shards

        tiny_shards(Path(name) / "corpus", 2, 40)
        ours, waits = (
            measured(Path(name), given.model, given.batch, given.checkpoints, kind) for kind in (True, False)
        )
    least = copy_s(ours["bytes"])
    pause, waited = statistics.median(ours["pause_s"][1:] or ours["pause_s"]), statistics.median(waits["pause_s"])
    result = {
        "model": given.model,
        "batch": given.batch,
        "parameters": ours["parameters"],
        "bytes": ours["bytes"],
        "first_pause_s": round(ours["pause_s"][0], 3),
        "pause_s": round(pause, 4),
        "synchronous_pause_s": round(waited, 3),
        "copy_s": round(least, 3),
        "written_after_s": round(statistics.median(ours["written_s"]), 2),
        "step_s": round(statistics.median(ours["step_s"]), 3),
        "step_beside_a_checkpoint_s": round(statistics.median(ours["step_beside_s"]), 3),
        "limit_over_pause": round(LIMIT_S / max(pause, 1e-6), 1),
        "limit_over_first_pause": round(LIMIT_S / max(ours["pause_s"][0], 1e-6), 2),
        "synchronous_over_pause": round(waited / max(pause, 1e-6), 1),
        "copy_over_pause": round(least / max(pause, 1e-6), 2),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
