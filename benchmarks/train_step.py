"""How long does a training step take beside open_clip's: same model, batch and threads, on the CPU?

A step is forward pass, loss, backward pass, AdamW and the bound on the logit scale, in float32, without clipping. Ours
takes our model, objective and optimiser; the other open_clip's model, its `ClipLoss` and AdamW as its trainer sets
it up (decay on matrices alone). Both begin with the same weights and see the same pairs; their losses are printed.
Steps alternate, what is counted is the process' CPU time (and, as `by_the_clock`, the wall's), and a ratio is the
median over neighbouring steps.

    python benchmarks/train_step.py [--models ViT-B-32 RN50] [--batch 8] [--steps 5] [--threads 2]
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import torch
from torch import Tensor, nn

from train.model import DualEncoder, create_model
from train.objectives import create_objective
from train.optim import OptimConfig, create_optimizer
from train.precision import laid_out

OPTIM = OptimConfig(learning_rate=1e-5, weight_decay=0.2)
Step = Callable[[Tensor, Tensor], float]


def our_step(model: DualEncoder) -> Step:
    """Return what takes one step of ours and returns the loss."""
    objective, optimizer = create_objective("clip"), create_optimizer(model, OPTIM)
    model.visual.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as a run has it by default

    def step(images: Tensor, tokens: Tensor) -> float:
        loss, _ = objective(model(laid_out(images, True), tokens), tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        objective.constrain(model)
        return loss.item()

    return step


def open_clip_step(model: Any, folder: Path) -> Step:
    """Return what takes one step of open_clip's and returns the loss."""
    peers.found(folder, "open_clip", peers.OPEN_CLIP)
    loss_of = importlib.import_module("open_clip.loss").ClipLoss(local_loss=False, cache_labels=True)
    named = list(model.named_parameters())
    plain = [value for name, value in named if value.ndim < 2 or "bn" in name or "ln" in name or "bias" in name]
    kept = {id(value) for value in plain}
    groups = [
        {"params": plain, "weight_decay": 0.0},
        {"params": [value for _, value in named if id(value) not in kept], "weight_decay": OPTIM.weight_decay},
    ]
    betas = (OPTIM.beta1, OPTIM.beta2)
    optimizer = torch.optim.AdamW(groups, lr=OPTIM.learning_rate, betas=betas, eps=OPTIM.epsilon)

    def step(images: Tensor, tokens: Tensor) -> float:
        optimizer.zero_grad()
        image, text, scale = model(images, tokens)
        loss = loss_of(image, text, scale)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)
        return float(loss.item())

    return step


def measure(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Return CPU seconds of a step on both sides, losses, and how many times ours the other's takes."""
    torch.manual_seed(0)
    ours = create_model(name).train()
    theirs: nn.Module = peers.open_clip_model(given.open_clip, name).train()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    steps = {"pairmill": our_step(ours), "open_clip": open_clip_step(theirs, given.open_clip)}
    side = ours.image_size or 224
    images = torch.randn(given.batch, 3, side, side)
    tokens = torch.randint(1, 49406, (given.batch, ours.context_length))
    tokens[:, -1] = 49407
    spent: dict[str, list[float]] = {who: [] for who in steps}
    walls: dict[str, list[float]] = {who: [] for who in steps}
    losses: dict[str, list[float]] = {who: [] for who in steps}
    for number in range(given.steps + 1):
        for who in list(steps)[:: 1 if number % 2 else -1]:
            begun, looked = time.process_time(), time.perf_counter()
            losses[who].append(steps[who](images, tokens))
            if number:  # the first one sets everything up
                spent[who].append(time.process_time() - begun)
                walls[who].append(time.perf_counter() - looked)
    share = statistics.median(a / b for a, b in zip(spent["pairmill"], spent["open_clip"], strict=True))
    return {
        "cpu_seconds": {who: round(statistics.median(seconds), 4) for who, seconds in spent.items()},
        "first_losses": {who: values[:2] for who, values in losses.items()},
        "share_of_open_clip": round(share, 3),
        "share_by_the_clock": round(
            statistics.median(a / b for a, b in zip(walls["pairmill"], walls["open_clip"], strict=True)), 3
        ),
        "ratio": round(1 / share, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["ViT-B-32", "RN50"], help="open_clip's names")
    parser.add_argument("--batch", type=int, default=8, help="pairs")
    parser.add_argument("--steps", type=int, default=5, help="counted steps of each side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--open-clip", type=Path, default=peers.OPEN_CLIP_FOLDER, help=f"folder with {peers.OPEN_CLIP}")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(json.dumps({name: measure(name, given) for name in given.models}, indent=2))


if __name__ == "__main__":
    main()
