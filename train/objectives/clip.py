"""CLIP's symmetric InfoNCE, exact across ranks.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", figure 3. The loss of a
small batch is computed from the whole matrix of logits, of a large one tile by tile.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from train.model import DualEncoder, Features
from train.objectives.gather import caption_numbers, every_text, gather_rows
from train.objectives.logsumexp import tiled_logsumexp
from train.objectives.tiles import TileSide, full_precision, tile_side, widened
from train.parallel import rank, world_size

MAX_LOGIT_SCALE = 100.0


class ClipObjective:
    """The symmetric cross-entropy between images and texts of a batch.

    Args:
        label_smoothing: weight spread evenly over all pairs of a row (Szegedy et al. 2016, section 7).
        same_text: what the other images of an identical token sequence are: `negative`, as in CLIP, or
            `positive`: the target is shared among them, as in UniCL (Yang et al. 2022, section 3.2).
        image_weight: weight of finding the text of an image, the rest being that of finding the image of a
            text; other than 0.5 as in ConVIRT (Zhang et al. 2020, equation 4, lambda).
        tile: side of a tile of logits, 0 for the whole matrix, `auto` by its size (`tiles.tile_side`).
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self,
        label_smoothing: float = 0.0,
        same_text: str = "negative",
        image_weight: float = 0.5,
        tile: TileSide = "auto",
    ) -> None:
        self.label_smoothing = label_smoothing
        self.same_text = same_text
        self.image_weight = image_weight
        self.tile = tile

    def __call__(self, features: Features, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this rank's share of the loss, and the share of its pairs ranked first (`accuracy`).

        Args:
            features: unit features `[B, D]` of this rank's images and texts, and the logit scale.
            tokens: token ids `[B, L]` of the texts.
        """
        image, text, scale = widened(features.image), widened(features.text), widened(features.logit_scale)
        with full_precision(image.device):
            side = tile_side(self.tile, len(image), world_size() * len(image), image)
            if side:
                loss, right = self._tiled(image, text, scale, tokens, side)
            else:
                loss, right = self._whole(image, text, scale, tokens)
        return loss, {"accuracy": right.float().mean()}

    def constrain(self, model: DualEncoder) -> None:
        """Keep the logit scale at 100 or less (section 2.5)."""
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))

    def _whole(self, image: Tensor, text: Tensor, scale: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Take the rows of this rank's images and of its texts against those of all ranks."""
        every_image, every_text = gather_rows(torch.stack([image, text], dim=1)).unbind(dim=1)
        by_image = scale * image @ every_text.T
        by_text = scale * text @ every_image.T
        positives = torch.arange(len(image), device=image.device) + rank() * len(image)
        if self.same_text == "positive":
            target = _shared_targets(tokens, by_image.dtype)
        else:
            target = F.one_hot(positives, by_image.shape[1]).to(by_image.dtype)
        smoothed = (1 - self.label_smoothing) * target + self.label_smoothing / target.shape[1]
        loss = self._weighed(F.cross_entropy(by_image, smoothed), F.cross_entropy(by_text, smoothed))
        return loss, by_image.detach().argmax(1) == positives

    def _tiled(self, image: Tensor, text: Tensor, scale: Tensor, tokens: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Take the rows of this rank's images, whose columns summed over ranks are the rows of the texts.

        A row's cross-entropy is its log-sum-exp less the mean of its logits under the target, which is one
        product with the mean of the texts. Summed over the batch that is the same number in both directions.
        """
        every_text, query = gather_rows(text), scale * image
        rows, columns, right = tiled_logsumexp(query, every_text, rank() * len(image), side)
        target = _shared_text(tokens, every_text) if self.same_text == "positive" else text
        if self.label_smoothing:
            target = torch.lerp(target, every_text.mean(0).expand_as(target), self.label_smoothing)
        loss = self._weighed(rows.mean(), columns.mean()) - (query * target).sum(1).mean()
        return loss.to(image.dtype), right

    def _weighed(self, by_image: Tensor, by_text: Tensor) -> Tensor:
        return self.image_weight * by_image + (1 - self.image_weight) * by_text


def _shared_targets(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Share each row's target among the texts equal to its own: `[B, world * B]`, rows summing to 1."""
    texts = every_text(tokens)
    own = texts[rank() * len(tokens) :][: len(tokens)]
    same = (own[:, None] == texts[None]).all(dim=2).to(dtype)
    return same / same.sum(dim=1, keepdim=True)


def _shared_text(tokens: Tensor, every_text: Tensor) -> Tensor:
    """Return for each of this rank's texts the mean `[B, D]` of the features of all texts equal to it."""
    numbers = caption_numbers(tokens)
    counts = torch.bincount(numbers).to(every_text.dtype)
    sums = every_text.new_zeros(len(counts), every_text.shape[1]).index_add(0, numbers, every_text)
    own = numbers[rank() * len(tokens) :][: len(tokens)]
    return sums[own] / counts[own, None]
