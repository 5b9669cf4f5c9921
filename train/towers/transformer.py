"""The transformer that both towers share: pre-norm residual attention blocks.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", section 2.4.
Parameters carry OpenAI's names (`resblocks.0.attn.in_proj_weight`, `mlp.c_fc`, ...).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train.towers.initial import draw_defaults


class QuickGELU(nn.Module):
    """OpenAI's approximation of GELU: `x * sigmoid(1.702 x)`."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply to a tensor of any shape."""
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "quick_gelu": QuickGELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
}


class Attention(nn.Module):
    """Multi-head self-attention; causal if asked: a token then sees itself and what is before it.

    Holds the parameters of `nn.MultiheadAttention` under the same names, and runs scaled-dot-product
    attention.
    """

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, L, width]` to `[B, L, width]`."""
        batch, length, width = x.shape
        packed = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        query, key, value = packed.view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, length, width))


def perceptron(width: int, hidden: int, activation: str) -> nn.Sequential:
    """Build the perceptron of a block: `[..., width]` to `[..., width]` through `hidden` channels."""
    return nn.Sequential(
        OrderedDict(
            c_fc=nn.Linear(width, hidden),
            gelu=ACTIVATIONS[activation](),
            c_proj=nn.Linear(hidden, width),
        )
    )


class ResidualAttentionBlock(nn.Module):
    """Pre-norm attention and a wider perceptron, each around a shortcut."""

    def __init__(self, width: int, heads: int, activation: str, causal: bool, epsilon: float, hidden: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads, causal)
        self.ln_1 = nn.LayerNorm(width, epsilon)
        self.mlp = perceptron(width, hidden, activation)
        self.ln_2 = nn.LayerNorm(width, epsilon)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, L, width]` to `[B, L, width]`."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of `ResidualAttentionBlock`s.

    Args:
        width: channels.
        layers: blocks.
        heads: attention heads of a block; must divide `width`.
        activation: a key of `ACTIVATIONS`.
        causal: a token sees itself and what is before it.
        epsilon: of the layer norms.
        hidden: channels inside a perceptron; 0: four times `width`.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        activation: str = "gelu",
        *,
        causal: bool,
        epsilon: float = 1e-5,
        hidden: int = 0,
    ) -> None:
        super().__init__()
        sizes = (width, heads, activation, causal, epsilon, hidden or 4 * width)
        self.resblocks = nn.Sequential(*(ResidualAttentionBlock(*sizes) for _ in range(layers)))

    def blocks(self) -> list[nn.Module]:
        """Return the blocks, first to last."""
        return list(self.resblocks.children())

    def init_weights(self, *, shrinking: bool) -> None:
        """Draw weights; `shrinking` as OpenAI's text tower does: residual branches shrink with depth.

        Otherwise as OpenAI's image tower is left: PyTorch's defaults, those of `nn.MultiheadAttention` for
        attention.
        """
        draw_defaults(self)
        for block in self.resblocks.children():
            assert isinstance(block, ResidualAttentionBlock)
            if shrinking:
                draw_shrinking(block, len(self.resblocks))
            else:
                nn.init.xavier_uniform_(block.attn.in_proj_weight)
            nn.init.zeros_(block.attn.in_proj_bias)
            nn.init.zeros_(block.attn.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, L, width]` to `[B, L, width]`."""
        return self.resblocks(x)


def draw_shrinking(block: ResidualAttentionBlock, layers: int) -> None:
    """Draw a block's weights as OpenAI's text tower of so many `layers` does; biases are left."""
    width = block.attn.out_proj.in_features
    branch = width**-0.5 * (2 * layers) ** -0.5
    nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
    nn.init.normal_(block.attn.out_proj.weight, std=branch)
    nn.init.normal_(block.mlp.get_submodule("c_fc").weight, std=(2 * width) ** -0.5)  # type: ignore[arg-type]
    nn.init.normal_(block.mlp.get_submodule("c_proj").weight, std=branch)  # type: ignore[arg-type]
