"""CLIP's loss and that of a decoder that writes each picture's caption, exact across ranks and micro batches.

Yu et al. 2022, "CoCa: Contrastive Captioners are Image-Text Foundation Models", section 3.2: the weighted sum of both
losses. The decoder reads the image tower's states alone, as in VirTex (Desai and Johnson 2021, "VirTex: Learning
Visual Representations from Textual Annotations", section 3), from the first token to the last.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infra.errors import UserError
from train.model import DualEncoder, Features
from train.objectives.clip import ClipObjective
from train.objectives.gather import mean_count
from train.objectives.tiles import TileSide, widened
from train.towers.decoder import TextDecoder


class CaptioningObjective(nn.Module):
    """CLIP's loss, and `caption_weight` times the cross-entropy of a caption's next token, averaged over tokens.

    Args:
        caption_weight: of the captions' loss; CoCa's is 2 (section 4.1).
        decoder_layers: blocks of the decoder; VirTex's best of one width has 1 (section 4.2).
        decoder_width: its channels.
        decoder_heads: its attention heads.
        label_smoothing, same_text, image_weight, tile: as `ClipObjective`'s.

    Raises:
        UserError: the heads do not divide the width.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    sample_needs: ClassVar[frozenset[str]] = frozenset({"image_states"})
    decoder: TextDecoder

    def __init__(
        self,
        caption_weight: float = 2.0,
        decoder_layers: int = 1,
        decoder_width: int = 512,
        decoder_heads: int = 8,
        label_smoothing: float = 0.0,
        same_text: str = "negative",
        image_weight: float = 0.5,
        tile: TileSide = "auto",
    ) -> None:
        super().__init__()
        if decoder_width % decoder_heads:
            raise UserError(
                f"objective.decoder_heads: {decoder_heads} heads do not divide decoder_width, {decoder_width}; "
                "take a divisor of it"
            )
        self.caption_weight = caption_weight
        self.layers, self.width, self.heads = decoder_layers, decoder_width, decoder_heads
        self.clip = ClipObjective(label_smoothing, same_text, image_weight, tile)

    def build(self, model: DualEncoder) -> None:
        """Make the decoder, for the model's vocabulary, context and image states."""
        vocabulary, memory_width = model.token_embedding.num_embeddings, model.visual.state_width
        self.decoder = TextDecoder(vocabulary, model.context_length, self.width, self.layers, self.heads, memory_width)

    def forward(self, features: Features, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this rank's share of CLIP's loss, and its `accuracy`; see `ClipObjective`."""
        return self.clip(features, tokens)

    def denominator(self, tokens: Tensor) -> Tensor:
        """Return how many tokens a rank predicts in the mean, of the texts `[B, L]` of this rank and all others."""
        return mean_count(_is_predicted(tokens).sum()).clamp(min=1)

    def of_samples(self, features: Features, tokens: Tensor, denominator: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted share of some samples in the captions' loss, and the same unweighted (`caption_loss`).

        Args:
            features: with image states `[B, P, W]`.
            tokens: token ids `[B, L]` of the texts.
            denominator: what the sum over tokens is divided by.
        """
        assert features.image_states is not None
        # Logits of padding would be most of them, and each has the size of the vocabulary.
        chosen = _is_predicted(tokens)
        states = self.decoder(tokens[:, :-1], features.image_states)[chosen]
        logits = widened(self.decoder.logits(states))
        loss = F.cross_entropy(logits, tokens[:, 1:][chosen], reduction="sum") / denominator.to(logits.dtype)
        return self.caption_weight * loss, {"caption_loss": loss.detach()}

    def constrain(self, model: DualEncoder) -> None:
        """As CLIP's."""
        self.clip.constrain(model)


def _is_predicted(tokens: Tensor) -> Tensor:
    """Tell for each token but the first `[B, L - 1]` whether it is one of the text, up to its end; 0 is a token too."""
    places = torch.arange(1, tokens.shape[1], device=tokens.device)
    return places <= tokens.argmax(dim=1, keepdim=True)
