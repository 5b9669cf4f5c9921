"""The vision transformer of CLIP (ViT-B/32, B/16, L/14, L/14 at 336).

Dosovitskiy et al. 2021, "An Image Is Worth 16x16 Words", with the layer norm before the transformer of Radford
et al. 2021, section 2.4. Parameters carry OpenAI's names (`class_embedding`, `ln_pre`, `proj`, ...).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from train.towers.initial import draw_defaults
from train.towers.transformer import Transformer


class VisionTransformer(nn.Module):
    """Patches and a class token through a transformer; the class token, projected, is the feature.

    Args:
        image_size: side of the pictures, pixels; the patch size must divide it.
        patch_size: side of a patch, pixels.
        width: channels.
        layers: blocks.
        heads: attention heads; must divide `width`.
        embed_dim: D of the features.
        activation: a key of `ACTIVATIONS`.
        patch_dropout: share of a picture's patches left out at each training step.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        embed_dim: int,
        *,
        activation: str = "gelu",
        patch_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.patch_dropout = patch_dropout
        self.patches = (image_size // patch_size) ** 2
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty((image_size // patch_size) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, activation, causal=False)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, embed_dim))

    def blocks(self) -> list[nn.Module]:
        """Return the residual blocks, first to last."""
        return self.transformer.blocks()

    def init_weights(self) -> None:
        """Draw weights as OpenAI's CLIP does."""
        for layer in (self.conv1, self.ln_pre, self.ln_post):
            draw_defaults(layer)
        self.transformer.init_weights(shrinking=False)
        for table in (self.class_embedding, self.positional_embedding, self.proj):
            nn.init.normal_(table, std=self.proj.shape[0] ** -0.5)

    @property
    def state_width(self) -> int:
        """W of `states`."""
        return self.proj.shape[0]

    def forward(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """Map normalised images `[B, 3, S, S]` to features `[B, D]`, not yet of unit length; `kept`: `trunk`."""
        return self.pooled(self.trunk(images, kept))

    def trunk(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """Map normalised images to all positions `[B, 1 + P, W]`, the class token first.

        In training, `kept` `[B, K]` says which patches are looked at; without it they are drawn here.
        """
        patches = self.conv1(images).flatten(2).transpose(1, 2) + self.positional_embedding[1:]
        if self.training and self.patch_dropout:
            patches = only_kept(patches, kept, self.patch_dropout)
        first = (self.class_embedding + self.positional_embedding[0]).to(patches.dtype)
        x = torch.cat([first.expand(len(patches), 1, -1), patches], dim=1)
        return self.transformer(self.ln_pre(x))

    def pooled(self, x: Tensor) -> Tensor:
        """Map what `trunk` gives to features `[B, D]`."""
        return self.ln_post(x[:, 0]) @ self.proj

    def states(self, x: Tensor) -> Tensor:
        """Map what `trunk` gives to the states `[B, P, W]` of the patches that were kept."""
        return self.ln_post(x[:, 1:])


def kept_patches(draws: Tensor, dropout: float) -> Tensor:
    """Choose a random share of each picture's patches (FLIP, Li et al. 2023, section 3).

    Args:
        draws: a uniform number for each patch `[B, N]`; equal rows choose alike on every device.
        dropout: share left out; one patch stays at least.

    Returns:
        numbers of those that stay, `[B, K]`.
    """
    kept = max(1, round(draws.shape[1] * (1 - dropout)))
    return draws.argsort(dim=1, stable=True)[:, :kept]


def only_kept(patches: Tensor, kept: Tensor | None, dropout: float) -> Tensor:
    """Return the patches `[B, K, C]` of `[B, N, C]` whose numbers `kept` `[B, K]` has; None: drawn here."""
    if kept is None:
        kept = kept_patches(torch.rand(patches.shape[:2], device=patches.device), dropout)
    return patches.gather(1, kept.unsqueeze(-1).expand(-1, -1, patches.shape[2]))
