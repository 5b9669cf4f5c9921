"""A causal transformer that reads a picture's states while it writes a text, token after token.

Vaswani et al. 2017, "Attention Is All You Need", section 3.1, with norms before the branches; the table of tokens is
that of the logits as well (Press and Wolf 2017), as in VirTex (Desai and Johnson 2021, section 3).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train.towers.initial import draw_defaults
from train.towers.transformer import ResidualAttentionBlock, draw_shrinking

EPSILON = 1e-5


class CrossAttention(nn.Module):
    """Multi-head attention from a text's positions to a picture's states."""

    def __init__(self, width: int, heads: int, memory_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        # One more term for all keys would change no softmax.
        self.k_proj = nn.Linear(memory_width, width, bias=False)
        self.v_proj = nn.Linear(memory_width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """Map `[B, T, width]` and `[B, P, memory_width]` to `[B, T, width]`."""
        parts = self.q_proj(x), self.k_proj(memory), self.v_proj(memory)
        split = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts]
        return self.out_proj(F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2))


class DecoderBlock(ResidualAttentionBlock):
    """A causal block with attention to the states between its own attention and its perceptron."""

    def __init__(self, width: int, heads: int, memory_width: int) -> None:
        super().__init__(width, heads, "gelu", causal=True, epsilon=EPSILON, hidden=4 * width)
        self.ln_cross = nn.LayerNorm(width, EPSILON)
        self.cross = CrossAttention(width, heads, memory_width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:  # type: ignore[override]
        """Map `[B, T, width]` and `[B, P, memory_width]` to `[B, T, width]`."""
        x = x + self.attn(self.ln_1(x))
        x = x + self.cross(self.ln_cross(x), memory)
        return x + self.mlp(self.ln_2(x))


class TextDecoder(nn.Module):
    """Token ids and a picture's states to what the next tokens are told from; weights are drawn at once.

    Args:
        vocabulary: token ids lie in `[0, vocabulary)`.
        context: longest text, tokens.
        width: channels.
        layers: blocks.
        heads: attention heads of a block; must divide `width`.
        memory_width: W of the states.
    """

    def __init__(self, vocabulary: int, context: int, width: int, layers: int, heads: int, memory_width: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.empty(context, width))
        self.ln_memory = nn.LayerNorm(memory_width, EPSILON)
        self.resblocks = nn.ModuleList(DecoderBlock(width, heads, memory_width) for _ in range(layers))
        self.ln_final = nn.LayerNorm(width, EPSILON)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw weights as OpenAI's text tower does: residual branches shrink with depth."""
        draw_defaults(self)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for block in self.resblocks:
            assert isinstance(block, DecoderBlock)
            draw_shrinking(block, len(self.resblocks))
            nn.init.zeros_(block.attn.in_proj_bias)
            nn.init.zeros_(block.attn.out_proj.bias)
            block.cross.out_proj.weight.mul_((2 * len(self.resblocks)) ** -0.5)

    def forward(self, tokens: Tensor, memory: Tensor) -> Tensor:
        """Map token ids `[B, T]` and states `[B, P, W]` to `[B, T, width]`: position `t` sees tokens up to `t`."""
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        memory = self.ln_memory(memory)
        for block in self.resblocks:
            x = block(x, memory)
        return self.ln_final(x)

    def logits(self, x: Tensor) -> Tensor:
        """Map `[..., width]` to the logits `[..., vocabulary]` of the next token."""
        return F.linear(x, self.token_embedding.weight)
