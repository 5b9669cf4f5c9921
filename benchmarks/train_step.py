"""How long does a training step take beside open_clip's: same model, batch and threads, on the CPU?

A step is forward pass, loss, backward pass, AdamW and the bound on the logit scale, in float32, without clipping. Ours
takes our model, objective and parameter groups; the other open_clip's model, its `ClipLoss` and the groups of its
trainer. AdamW is the same on both sides, fused, with the same settings; `without_optimizer` leaves it out, with the
bound and the zeroing of gradients. Both begin with the same weights and see the same pairs, laid out alike: channels
last, as a run of ours has them, or contiguous; with `--layout own` each side has its own trainer's, ours channels last
and open_clip's contiguous. Their losses are printed. Steps alternate, what is counted is the process' CPU time (and, as
`by_the_clock`, the wall's), and a ratio is the median over neighbouring steps. How far it is goes to standard error.

    python benchmarks/train_step.py [--models ViT-B-32 RN50] [--batch 4] [--steps 3] [--threads 1]
        [--layout channels_last] [--limit-s 90]
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import peers
import torch
from torch import Tensor, nn

from train.model import DualEncoder, create_model
from train.objectives import create_objective
from train.optim import OptimConfig, create_optimizer
from train.precision import laid_out

OPTIM = OptimConfig(learning_rate=1e-5, weight_decay=0.2)
LAYOUTS = {"channels_last": (True, True), "contiguous": (False, False), "own": (True, False)}
"""Whether ours and open_clip's pictures and image tower are channels last."""


class Side(NamedTuple):
    """The two parts of a step: one leaves gradients and returns the loss, the other is the optimiser's."""

    gradients: Callable[[Tensor, Tensor], Tensor]
    update: Callable[[], None]


def our_side(model: DualEncoder, channels_last: bool) -> Side:
    """Return our step."""
    objective, optimizer = create_objective("clip"), create_optimizer(model, OPTIM)
    if channels_last:
        model.visual.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def gradients(images: Tensor, tokens: Tensor) -> Tensor:
        loss, _ = objective(model(laid_out(images, channels_last), tokens), tokens)
        loss.backward()
        return loss

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        objective.constrain(model)

    return Side(gradients, update)


def open_clip_side(model: Any, folder: Path, channels_last: bool) -> Side:
    """Return open_clip's step."""
    if channels_last:
        model.visual.to(memory_format=torch.channels_last)
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
    optimizer = torch.optim.AdamW(groups, lr=OPTIM.learning_rate, betas=betas, eps=OPTIM.epsilon, fused=True)

    def gradients(images: Tensor, tokens: Tensor) -> Tensor:
        image, text, scale = model(laid_out(images, channels_last), tokens)
        loss: Tensor = loss_of(image, text, scale)
        loss.backward()
        return loss

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)

    return Side(gradients, update)


class Spent:
    """What steps have taken, by side: CPU seconds with and without the optimiser, and the wall's with it."""

    def __init__(self, sides: Mapping[str, Side]) -> None:
        self.sides = sides
        self.whole: dict[str, list[float]] = {who: [] for who in sides}
        self.gradients: dict[str, list[float]] = {who: [] for who in sides}
        self.clock: dict[str, list[float]] = {who: [] for who in sides}
        self.losses: dict[str, list[float]] = {who: [] for who in sides}

    def step(self, who: str, images: Tensor, tokens: Tensor, *, counted: bool) -> None:
        """Take one step of a side."""
        looked, begun = time.perf_counter(), time.process_time()
        loss = self.sides[who].gradients(images, tokens).item()
        between = time.process_time()
        self.sides[who].update()
        if counted:
            self.whole[who].append(time.process_time() - begun)
            self.gradients[who].append(between - begun)
            self.clock[who].append(time.perf_counter() - looked)
        self.losses[who].append(loss)


def share(seconds: Mapping[str, list[float]]) -> float:
    """Return how many times open_clip's ours takes: the median over neighbouring steps."""
    return statistics.median(a / b for a, b in zip(seconds["pairmill"], seconds["open_clip"], strict=True))


def measure(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Return CPU seconds of a step on both sides, losses, and how many times ours the other's takes."""
    torch.manual_seed(0)
    ours = create_model(name).train()
    theirs: nn.Module = peers.open_clip_model(given.open_clip, name).train()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours_last, theirs_last = LAYOUTS[given.layout]
    spent = Spent({
        "pairmill": our_side(ours, ours_last),
        "open_clip": open_clip_side(theirs, given.open_clip, theirs_last),
    })  # fmt: skip
    side = ours.image_size or 224
    images = torch.randn(given.batch, 3, side, side)
    tokens = torch.randint(1, 49406, (given.batch, ours.context_length))
    tokens[:, -1] = 49407
    begun = time.perf_counter()
    for number in range(given.steps + 1):
        if number > 1 and time.perf_counter() - begun > given.limit_s:
            break
        for who in list(spent.sides)[:: 1 if number % 2 else -1]:
            spent.step(who, images, tokens, counted=number > 0)  # the first one sets everything up
            say(f"{name} {who}: step {number} of {given.steps}, {time.perf_counter() - begun:.0f} s")
    return {
        "layout": given.layout,
        "batch": given.batch,
        "steps": len(spent.whole["pairmill"]),
        "cpu_seconds": {who: round(statistics.median(seconds), 4) for who, seconds in spent.whole.items()},
        "first_losses": {who: values[:2] for who, values in spent.losses.items()},
        "share_of_open_clip": round(share(spent.whole), 3),
        "share_without_optimizer": round(share(spent.gradients), 3),
        "share_by_the_clock": round(share(spent.clock), 3),
        "ratio": round(1 / share(spent.whole), 3),
        "ratio_without_optimizer": round(1 / share(spent.gradients), 3),
    }


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["ViT-B-32", "RN50"], help="open_clip's names")
    parser.add_argument("--batch", type=int, default=4, help="pairs")
    parser.add_argument("--steps", type=int, default=3, help="counted steps of each side")
    parser.add_argument("--layout", choices=LAYOUTS, default="channels_last", help="of pictures and image towers")
    parser.add_argument("--limit-s", type=float, default=90.0, help="seconds of a model after which no step begins")
    parser.add_argument("--threads", type=int, default=1, help="of one no other process can hold up a second")
    parser.add_argument("--open-clip", type=Path, default=peers.OPEN_CLIP_FOLDER, help=f"folder with {peers.OPEN_CLIP}")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found = {}
    for name in given.models:
        say(f"{name}: building both models")
        found[name] = measure(name, given)
        say(f"{name}: ratio {found[name]['ratio']}")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
