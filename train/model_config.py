"""The sizes of a dual encoder, as RUN.toml has them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from infra.config import Config

Activation = Literal["gelu", "quick_gelu", "gelu_tanh"]


def _check_heads(heads: int, width: int) -> None:
    if width % heads:
        raise ValueError(f"{heads} heads do not divide a width of {width}: choose a divisor")


class VisionConfig(Config):
    """The residual image tower."""

    widths: tuple[PositiveInt, ...] = Field(
        default=(48, 96, 192, 384), min_length=1, description="channels of each stage"
    )
    depths: tuple[PositiveInt, ...] = Field(
        default=(1, 1, 1, 1), min_length=1, description="residual blocks of each stage"
    )
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


class ViTConfig(Config):
    """A vision transformer as the image tower: CLIP's, or SigLIP's with attention pooling."""

    image_size: int = Field(default=224, ge=8, description="side of the pictures, pixels")
    patch_size: int = Field(default=32, ge=1, description="side of a patch, pixels")
    width: int = Field(default=768, ge=8, description="channels")
    layers: int = Field(default=12, ge=1, description="blocks")
    heads: int = Field(default=12, ge=1, description="attention heads")
    activation: Activation = Field(default="gelu", description="perceptron's activation")
    pool: Literal["class", "attention"] = Field(
        default="class",
        description="what the feature is: the class token, projected (CLIP), or attention pooling (SigLIP)",
    )

    @model_validator(mode="after")
    def _sizes_divide(self) -> ViTConfig:
        if self.image_size % self.patch_size:
            raise ValueError(f"patches of {self.patch_size} pixels do not divide a side of {self.image_size}")
        _check_heads(self.heads, self.width)
        return self


class ResNetConfig(Config):
    """CLIP's modified ResNet as the image tower."""

    image_size: int = Field(default=224, ge=32, multiple_of=32, description="side of the pictures, pixels")
    layers: tuple[int, int, int, int] = Field(default=(3, 4, 6, 3), description="blocks of each stage")
    width: int = Field(default=64, ge=2, multiple_of=2, description="channels of the stem")
    heads: int = Field(default=32, ge=1, description="attention heads of the pooling")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ResNetConfig:
        _check_heads(self.heads, self.width * 32)
        return self


class TextConfig(Config):
    """The text transformer: CLIP's is causal and pooled at the end token."""

    context: int = Field(
        default=32, ge=4, description="longest text, tokens; longer ones are cut with their end token kept"
    )
    width: int = Field(default=256, ge=8, description="channels")
    layers: int = Field(default=2, ge=1, description="blocks")
    heads: int = Field(default=4, ge=1, description="attention heads")
    activation: Activation = Field(default="gelu", description="perceptron's activation")
    causal: bool = Field(default=True, description="a token sees itself and what is before it, not what follows")
    pool: Literal["end", "last"] = Field(
        default="end", description="which position the feature is: the end token's, or the last one of the context"
    )
    projection_bias: bool = Field(default=False, description="a bias after the projection, as SigLIP has it")
    epsilon: float = Field(default=1e-5, gt=0, description="of the layer norms")

    @model_validator(mode="after")
    def _heads_divide(self) -> TextConfig:
        _check_heads(self.heads, self.width)
        return self


class ModelConfig(Config):
    """Sizes of both towers; `name` takes those of a known model."""

    name: str = Field(default="", description="a name known to `create_model`; empty: the sizes given here")
    embed_dim: int = Field(default=256, ge=2, description="length D of the features")
    vision: VisionConfig = Field(default=VisionConfig(), description="image tower, where none of the next two is given")
    vit: ViTConfig | None = Field(default=None, description="image tower: a vision transformer")
    resnet: ResNetConfig | None = Field(default=None, description="image tower: CLIP's modified ResNet")
    text: TextConfig = Field(default=TextConfig(), description="text tower")
    weights: str = Field(
        default="", description="file of published weights that the run begins with; empty: drawn ones"
    )
    temperature: float = Field(default=0.07, gt=0, description="initial temperature (1 / logit scale)")
    logit_bias: float | None = Field(default=None, description="first bias of the logits; none: there is no bias")
    statistics_group: int = Field(
        default=0, ge=0, description="as `vision.statistics_group`, for any ResNet, a named one too"
    )
    patch_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="share of a picture's patches left out at each training step (ViT)"
    )

    @model_validator(mode="after")
    def _one_image_tower(self) -> ModelConfig:
        if self.vit and self.resnet:
            raise ValueError("both vit and resnet are given: keep one of them")
        if self.vit and self.vit.pool == "attention" and self.vit.width != self.embed_dim:
            raise ValueError(f"embed_dim is {self.embed_dim}, but attention pooling gives vit.width, {self.vit.width}")
        if self.patch_dropout and self.vit is None and not self.name:
            raise ValueError("patch_dropout is for vision transformers alone: set it to 0")
        return self
