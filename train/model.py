"""The dual encoder: an image tower, a text tower and a learned temperature."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from infra.config import Config, nearest
from infra.errors import UserError
from train.towers.resnet import BasicBlock, ResidualTower
from train.towers.text import ResidualAttentionBlock, Transformer


class VisionConfig(Config):
    """The residual image tower."""

    widths: tuple[int, ...] = Field(default=(48, 96, 192, 384), description="channels of each stage")
    depths: tuple[int, ...] = Field(default=(1, 1, 1, 1), description="residual blocks of each stage")
    stem_stride: int = Field(default=2, ge=1, description="stride of the first convolution, pixels")
    pool_grid: int = Field(
        default=1,
        ge=1,
        description="cells a side that the last stage is averaged to before the projection; 1: one mean over all",
    )
    statistics_group: int = Field(
        default=0,
        ge=0,
        description="samples whose batch statistics are taken together; every rank must hold whole groups, "
        "then gradients do not depend on the world size (0: the rank's whole batch)",
    )

    @model_validator(mode="after")
    def _one_depth_a_width(self) -> VisionConfig:
        if len(self.widths) != len(self.depths):
            raise ValueError(f"{len(self.widths)} widths but {len(self.depths)} depths: give one depth for each width")
        return self


class TextConfig(Config):
    """The causal text transformer."""

    context: int = Field(
        default=32, ge=4, description="longest text, tokens; longer ones are cut with their end token kept"
    )
    width: int = Field(default=256, ge=8, description="channels")
    layers: int = Field(default=2, ge=1, description="blocks")
    heads: int = Field(default=4, ge=1, description="attention heads")
    activation: Literal["gelu", "quick_gelu"] = Field(default="gelu", description="perceptron's activation")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> TextConfig:
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide a width of {self.width}: choose a divisor")
        return self


class ModelConfig(Config):
    """Sizes of both towers; `name` takes those of a known model."""

    name: str = Field(default="", description="a name known to `create_model`; empty: the sizes given here")
    embed_dim: int = Field(default=256, ge=2, description="length D of the features")
    vision: VisionConfig = Field(default=VisionConfig(), description="image tower")
    text: TextConfig = Field(default=TextConfig(), description="text tower")
    temperature: float = Field(default=0.07, gt=0, description="initial temperature (1 / logit scale)")


MODELS: dict[str, ModelConfig] = {
    "RN10-small": ModelConfig(),
    "RN10-tiny": ModelConfig(
        embed_dim=32,
        vision=VisionConfig(widths=(8, 16), depths=(1, 1)),
        text=TextConfig(context=16, width=32, layers=1, heads=2),
    ),
}


class Features(NamedTuple):
    """What the objectives read: unit features `[B, D]` of both towers, logit scale and bias (float32 scalars)."""

    image: Tensor
    text: Tensor
    logit_scale: Tensor
    logit_bias: Tensor | None = None


class DualEncoder(nn.Module):
    """CLIP (Radford et al. 2021, section 2.3), with OpenAI's parameter names.

    Args:
        config: sizes of both towers.
        vocabulary: token ids lie in `[0, vocabulary)`, and the end-of-text token is the largest id of a text.
    """

    def __init__(self, config: ModelConfig, vocabulary: int) -> None:
        super().__init__()
        vision, text = config.vision, config.text
        self.visual = ResidualTower(
            vision.widths,
            vision.depths,
            config.embed_dim,
            stem_stride=vision.stem_stride,
            pool_grid=vision.pool_grid,
            group=vision.statistics_group,
        )
        self.transformer = Transformer(text.width, text.layers, text.heads, text.activation)
        self.context_length = text.context
        self.token_embedding = nn.Embedding(vocabulary, text.width)
        self.positional_embedding = nn.Parameter(torch.empty(text.context, text.width))
        self.ln_final = nn.LayerNorm(text.width)
        self.text_projection = nn.Parameter(torch.empty(text.width, config.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / config.temperature)))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=text.width**-0.5)

    def blocks(self) -> list[nn.Module]:
        """Return the repeated blocks of both towers, in forward order."""
        return [block for block in self.modules() if isinstance(block, BasicBlock | ResidualAttentionBlock)]

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Map normalised images `[B, 3, H, W]` to features `[B, D]`."""
        features = self.visual(images)
        return _unit(features) if normalize else features

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Map token ids `[B, L]`, `L <= context`, padded with 0 after the end token, to features `[B, D]`.

        Attention is causal, so columns of padding alone may be left out: the features do not change.
        """
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        x = self.ln_final(self.transformer(x))
        x = x[torch.arange(len(x), device=x.device), tokens.argmax(dim=-1)] @ self.text_projection
        return _unit(x) if normalize else x

    def forward(self, images: Tensor, tokens: Tensor) -> Features:
        """Encode pairs: images `[B, 3, H, W]` and token ids `[B, L]` to unit `Features`."""
        image = self.encode_image(images, normalize=True)
        text = self.encode_text(tokens, normalize=True)
        return Features(image, text, self.logit_scale.exp())


def create_model(config: str | ModelConfig, vocabulary: int = 49408) -> DualEncoder:
    """Build a dual encoder from sizes or from a known name.

    Raises:
        UserError: no model has that name; the message names the nearest one.
    """
    name = config if isinstance(config, str) else config.name
    if name:
        if name not in MODELS:
            raise UserError(f"model.name: no model is called {name!r}{nearest(name, list(MODELS))}")
        config = MODELS[name]
    assert isinstance(config, ModelConfig)
    return DualEncoder(config, vocabulary)


def _unit(features: Tensor) -> Tensor:
    # Half precision loses the third digit of a cosine, which the temperature then multiplies by up to 100.
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
