"""The vision transformer of SigLIP: no class token; attention from one learned query pools the patches.

Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training"; the pooling is the MAP head of Zhai et al.
2022, "Scaling Vision Transformers", section 2.1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train.towers.initial import draw_defaults
from train.towers.transformer import Transformer, perceptron
from train.towers.vit import only_kept

EPSILON = 1e-6


class AttentionPooling(nn.Module):
    """One learned query attends to all positions; a perceptron around a shortcut follows."""

    def __init__(self, width: int, heads: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.heads = heads
        self.probe = nn.Parameter(torch.empty(width))
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.ln = nn.LayerNorm(width, EPSILON)
        self.mlp = perceptron(width, hidden, activation)

    def init_weights(self) -> None:
        """Draw weights."""
        draw_defaults(self)
        nn.init.normal_(self.probe, std=len(self.probe) ** -0.5)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, N, width]` to `[B, width]`."""
        batch, _, width = x.shape
        weight, bias = self.in_proj_weight, self.in_proj_bias
        query = F.linear(self.probe.to(x.dtype), weight[:width], bias[:width]).expand(batch, 1, width)
        key, value = F.linear(x, weight[width:], bias[width:]).chunk(2, dim=-1)
        split = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value)]
        mixed = self.out_proj(F.scaled_dot_product_attention(*split).flatten(1))
        return mixed + self.mlp(self.ln(mixed))


class MapVisionTransformer(nn.Module):
    """Patches through a transformer, pooled by attention: D is the width.

    Arguments as those of `VisionTransformer`; `hidden` is the width of the perceptrons (0: four times `width`).
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        *,
        activation: str = "gelu_tanh",
        patch_dropout: float = 0.0,
        hidden: int = 0,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.patch_dropout = patch_dropout
        self.patches = (image_size // patch_size) ** 2
        hidden = hidden or 4 * width
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size)
        self.positional_embedding = nn.Parameter(torch.empty((image_size // patch_size) ** 2, width))
        self.transformer = Transformer(width, layers, heads, activation, causal=False, epsilon=EPSILON, hidden=hidden)
        self.ln_post = nn.LayerNorm(width, EPSILON)
        self.attn_pool = AttentionPooling(width, heads, hidden, activation)

    def blocks(self) -> list[nn.Module]:
        """Return the residual blocks, first to last."""
        return self.transformer.blocks()

    def init_weights(self) -> None:
        """Draw weights."""
        draw_defaults(self.conv1)
        draw_defaults(self.ln_post)
        nn.init.normal_(self.positional_embedding, std=self.positional_embedding.shape[1] ** -0.5)
        self.transformer.init_weights(shrinking=False)
        self.attn_pool.init_weights()

    @property
    def state_width(self) -> int:
        """W of `states`."""
        return self.positional_embedding.shape[1]

    def forward(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """Map normalised images `[B, 3, S, S]` to features `[B, width]`, not yet of unit length; `kept` as there."""
        return self.pooled(self.trunk(images, kept))

    def trunk(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """Map normalised images to patches `[B, P, W]`; `kept` as in `VisionTransformer.trunk`."""
        patches = self.conv1(images).flatten(2).transpose(1, 2) + self.positional_embedding
        if self.training and self.patch_dropout:
            patches = only_kept(patches, kept, self.patch_dropout)
        return self.ln_post(self.transformer(patches))

    def pooled(self, x: Tensor) -> Tensor:
        """Map what `trunk` gives to features `[B, W]`."""
        return self.attn_pool(x)

    def states(self, x: Tensor) -> Tensor:
        """Return what `trunk` gives: the states `[B, P, W]` of the patches that were kept."""
        return x
