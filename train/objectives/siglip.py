"""SigLIP's sigmoid loss, exact across ranks.

Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", section 3.2 and algorithm 1: every pair of a batch
is a yes or no of its own. The paper passes the texts round the ranks (section 3.3) so that none holds all logits. Here
all ranks' texts are gathered once and the logits come tile by tile. What is held is `[N, D]`, 64 MB for 32,768 texts of
512 numbers; as many bytes are sent as round the ring, each way in one collective.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from infra.errors import UserError
from train.model import DualEncoder, Features
from train.objectives.gather import caption_numbers, gather_rows
from train.objectives.sigmoid import tiled_sigmoid_loss
from train.objectives.tiles import TileSide, full_precision, tile_side, widened
from train.parallel import rank, world_size


class SiglipObjective:
    """The sigmoid loss of all pairs, summed over the texts and averaged over the images.

    Args:
        same_text: what the other images of an identical token sequence are: `negative`, as in SigLIP, or `positive`.
        tile: side of a tile of logits, 0 for this rank's rows and another's columns at once, `auto` by size
            (`tiles.tile_side`).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logit_bias"})

    def __init__(self, same_text: str = "negative", tile: TileSide = "auto") -> None:
        self.same_text = same_text
        self.tile = tile

    def __call__(self, features: Features, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this rank's share of the loss, and the share of its images whose text is ranked first (`accuracy`).

        Args:
            features: unit features `[B, D]` of this rank's images and texts, the logit scale and the logit bias.
            tokens: token ids `[B, L]` of the texts.

        Raises:
            UserError: the model has no logit bias.
        """
        if features.logit_bias is None:
            raise UserError(
                "objective.name: 'siglip' needs a model with a logit bias; set model.logit_bias or take 'clip'"
            )
        image, text = widened(features.image), widened(features.text)
        scale, bias = widened(features.logit_scale), features.logit_bias.to(image.dtype)
        side = tile_side(self.tile, len(image), world_size() * len(image), image) or len(image)
        numbers = caption_numbers(tokens) if self.same_text == "positive" else None
        with full_precision(image.device):
            total, right = tiled_sigmoid_loss(
                scale * image, gather_rows(text), bias, numbers, rank() * len(image), side
            )
        return total / len(image), {"accuracy": right.float().mean()}

    def constrain(self, model: DualEncoder) -> None:
        """Leave the scale as it is: the paper bounds it nowhere."""
