"""CLIP's symmetric InfoNCE, exact across ranks.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", figure 3. Each
rank takes the rows of its own images and texts against those of all ranks.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from train.model import DualEncoder, Features
from train.parallel import rank, world_size

MAX_LOGIT_SCALE = 100.0


class GatherRows(torch.autograd.Function):
    """All ranks' rows, with gradients that flow back to the rank that made them.

    The backward pass sums over ranks, so the mean over ranks that data parallelism takes afterwards turns
    each rank's share of the loss into the gradient of their mean.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:
        """Map this rank's `[B, D]` to the `[world * B, D]` of all ranks, in rank order."""
        rows = rows.contiguous()
        gathered = rows.new_empty(world_size() * len(rows), *rows.shape[1:])
        dist.all_gather(list(gathered.chunk(world_size())), rows)
        return gathered

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        """Sum every rank's gradient `[world * B, D]` and keep this rank's `[B, D]`."""
        summed = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed.chunk(world_size())[rank()]


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all ranks `[world * B, D]`, differentiable; a single process gets its own back."""
    return rows if world_size() == 1 else GatherRows.apply(rows)


class ClipObjective:
    """The symmetric cross-entropy between images and texts of a batch.

    Args:
        label_smoothing: weight spread evenly over all pairs of a row (Szegedy et al. 2016, section 7).
        same_text: what the other images of an identical token sequence are: `negative`, as in CLIP, or
            `positive`: the target is shared among them, as in UniCL (Yang et al. 2022, section 3.2).
    """

    def __init__(self, label_smoothing: float = 0.0, same_text: str = "negative") -> None:
        self.label_smoothing = label_smoothing
        self.same_text = same_text

    def __call__(self, features: Features, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this rank's share of the loss, and the share of its pairs ranked first (`accuracy`).

        Args:
            features: unit features `[B, D]` of this rank's images and texts, and the logit scale.
            tokens: token ids `[B, L]` of the texts.
        """
        image, text, scale = features.image, features.text, features.logit_scale
        every_image, every_text = gather_rows(torch.stack([image, text], dim=1)).unbind(dim=1)
        by_image = scale * image @ every_text.T
        by_text = scale * text @ every_image.T
        positives = torch.arange(len(image), device=image.device) + rank() * len(image)
        if self.same_text == "positive":
            target = _shared_targets(tokens, by_image.dtype)
        else:
            target = F.one_hot(positives, by_image.shape[1]).to(by_image.dtype)
        smoothed = (1 - self.label_smoothing) * target + self.label_smoothing / target.shape[1]
        loss = (F.cross_entropy(by_image, smoothed) + F.cross_entropy(by_text, smoothed)) / 2
        accuracy = (by_image.detach().argmax(1) == positives).float().mean()
        return loss, {"accuracy": accuracy}

    def constrain(self, model: DualEncoder) -> None:
        """Keep the logit scale at 100 or less (section 2.5)."""
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))


def _shared_targets(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Share each row's target among the texts equal to its own: `[B, world * B]`, rows summing to 1."""
    every_text = tokens
    if world_size() > 1:
        every_text = tokens.new_empty(world_size() * len(tokens), tokens.shape[1])
        dist.all_gather(list(every_text.chunk(world_size())), tokens.contiguous())
    same = (tokens[:, None] == every_text[None]).all(dim=2).to(dtype)
    return same / same.sum(dim=1, keepdim=True)
