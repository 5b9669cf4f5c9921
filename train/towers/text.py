"""The text tower of CLIP: a causal transformer pooled at the end-of-text token.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", section 2.4.
Parameters carry OpenAI's names (`resblocks.0.attn.in_proj_weight`, `mlp.c_fc`, ...).
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class QuickGELU(nn.Module):
    """OpenAI's approximation of GELU: `x * sigmoid(1.702 x)`."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply to a tensor of any shape."""
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "quick_gelu": QuickGELU}


class CausalAttention(nn.Module):
    """Multi-head self-attention in which a token sees itself and what is before it.

    Holds the parameters of `nn.MultiheadAttention` under the same names, and runs scaled-dot-product
    attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, L, width]` to `[B, L, width]`."""
        batch, length, width = x.shape
        packed = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        query, key, value = packed.view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, length, width))


class ResidualAttentionBlock(nn.Module):
    """Pre-norm attention and a four-times wider perceptron, each around a shortcut."""

    def __init__(self, width: int, heads: int, activation: str) -> None:
        super().__init__()
        self.attn = CausalAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, 4 * width),
                gelu=ACTIVATIONS[activation](),
                c_proj=nn.Linear(4 * width, width),
            )
        )
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, L, width]` to `[B, L, width]`."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of `ResidualAttentionBlock`s."""

    def __init__(self, width: int, layers: int, heads: int, activation: str) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*(ResidualAttentionBlock(width, heads, activation) for _ in range(layers)))
        self.initialise(width, layers)

    def initialise(self, width: int, layers: int) -> None:
        """Draw weights as OpenAI's CLIP does: residual branches shrink with depth."""
        branch = width**-0.5 * (2 * layers) ** -0.5
        for block in self.resblocks.children():
            assert isinstance(block, ResidualAttentionBlock)
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=branch)
            nn.init.normal_(block.mlp.get_submodule("c_fc").weight, std=(2 * width) ** -0.5)  # type: ignore[arg-type]
            nn.init.normal_(block.mlp.get_submodule("c_proj").weight, std=branch)  # type: ignore[arg-type]
            nn.init.zeros_(block.attn.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, L, width]` to `[B, L, width]`."""
        return self.resblocks(x)
