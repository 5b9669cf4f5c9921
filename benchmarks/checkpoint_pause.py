"""How long does the training loop stand still for a checkpoint?

A model of ViT-B/16's size (150 million parameters and AdamW's two moments in float32, 1.8 GB) is trained for some
steps on tiny shards, with a checkpoint after each: first asynchronously, then with the loop waiting for the disk. The
pause is what `Saver.save` and the wait in `optimizer.step` take together; the first asynchronous one also fills new
buffers. Beside it: one copy of as many bytes by one thread, which is the least that a copy could take, and what a step
takes alone and while a checkpoint is copied and written. Prints one JSON object; ratios above 1 are good.

    python benchmarks/checkpoint_pause.py [--width 1024] [--layers 12] [--checkpoints 4] [--folder DIR]
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
VOCABULARY = 320


def prepared(folder: Path, width: int, layers: int, asynchronous: bool) -> Any:
    """Return a run at its beginning, in `folder`."""
    from infra.config import parse
    from train.config import RunConfig
    from train.launch import prepare
    from train.state import build

    raw = {
        "length": "1000 steps",
        "data": {"folder": str(folder / "corpus"), "global_batch_size": 8, "image_size": 16},
        "tokenizer": {"vocabulary": VOCABULARY},
        "model": {
            "embed_dim": 64,
            "vision": {"widths": [8], "depths": [1]},
            "text": {"context": 8, "width": width, "layers": layers, "heads": width // 64},
        },
        "parallel": {"precision": "float32"},
        "checkpoint": {"keep": 1, "asynchronous": asynchronous},
    }
    run = folder / ("asynchronous" if asynchronous else "synchronous")
    config = parse(raw, RunConfig, source="benchmark")
    prepare(config, run, 1)
    return build(config, run), run


def measured(folder: Path, width: int, layers: int, checkpoints: int, asynchronous: bool) -> dict[str, Any]:
    """Train with a checkpoint after each step; return the pauses and the times of steps, in seconds."""
    from train.checkpoint import Saver
    from train.loop import train_step

    state, run = prepared(folder, width, layers, asynchronous)
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
    parser.add_argument("--width", type=int, default=1024, help="of the text tower, a multiple of 64")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--checkpoints", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where checkpoints go; a temporary one by default")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pairmill-bench-", dir=given.folder) as name:
        from tiny_shards import tiny_shards

        tiny_shards(Path(name) / "corpus", 2, 40)
        ours, waits = (
            measured(Path(name), given.width, given.layers, given.checkpoints, kind) for kind in (True, False)
        )
    least = copy_s(ours["bytes"])
    pause, waited = statistics.median(ours["pause_s"][1:] or ours["pause_s"]), statistics.median(waits["pause_s"])
    result = {
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
