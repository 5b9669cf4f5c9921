"""The dual encoder: an image tower, a text tower and a learned temperature."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infra.errors import UserError
from train.model_config import ModelConfig, ResNetConfig, TextConfig, VisionConfig, ViTConfig
from train.models import MODELS, sizes_of
from train.towers.initial import draw_defaults
from train.towers.map_vit import MapVisionTransformer
from train.towers.modified_resnet import ModifiedResNet
from train.towers.resnet import ResidualTower
from train.towers.transformer import Transformer
from train.towers.vit import VisionTransformer

__all__ = [
    "MODELS",
    "DualEncoder",
    "Features",
    "ModelConfig",
    "ResNetConfig",
    "TextConfig",
    "ViTConfig",
    "VisionConfig",
    "create_model",
]

ImageTower = ResidualTower | ModifiedResNet | VisionTransformer | MapVisionTransformer


class Features(NamedTuple):
    """What the objectives read.

    Attributes:
        image: unit features `[B, D]` of the pictures, float32.
        text: those of the texts.
        logit_scale: what a cosine is multiplied by, float32.
        logit_bias: what is added then (SigLIP), float32; None for a model without.
        image_states: states `[B, P, W]` of patches or cells, in the towers' arithmetic; None where nobody asked.
        text_states: states `[B, T, W]` of the tokens, normalised; T is that of the ids, or the whole context where
            attention is not causal; None where nobody asked.
    """

    image: Tensor
    text: Tensor
    logit_scale: Tensor
    logit_bias: Tensor | None = None
    image_states: Tensor | None = None
    text_states: Tensor | None = None


STATES = frozenset({"image_states", "text_states"})
"""Fields of `Features` that are there for those who ask."""
POOLED: frozenset[str] = frozenset()


class DualEncoder(nn.Module):
    """CLIP (Radford et al. 2021, section 2.3), with OpenAI's parameter names.

    Built with no weights drawn: `create_model` does both.

    Args:
        config: sizes of both towers; its `name` is not looked at.
        vocabulary: token ids lie in `[0, vocabulary)`, and the end-of-text token is the largest id of a text.
    """

    def __init__(self, config: ModelConfig, vocabulary: int) -> None:
        super().__init__()
        text = config.text
        self.config = config
        self.visual = _image_tower(config)
        self.transformer = Transformer(
            text.width, text.layers, text.heads, text.activation, causal=text.causal, epsilon=text.epsilon
        )
        self.context_length = text.context
        self.token_embedding = nn.Embedding(vocabulary, text.width)
        self.positional_embedding = nn.Parameter(torch.empty(text.context, text.width))
        self.ln_final = nn.LayerNorm(text.width, text.epsilon)
        self.text_projection = nn.Parameter(torch.empty(text.width, config.embed_dim))
        self.text_projection_bias = nn.Parameter(torch.empty(config.embed_dim)) if text.projection_bias else None
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.logit_bias = nn.Parameter(torch.empty(())) if config.logit_bias is not None else None

    @property
    def image_size(self) -> int | None:
        """Side of the pictures that the image tower takes, pixels; None: any."""
        return getattr(self.visual, "image_size", None)

    def blocks(self) -> list[nn.Module]:
        """Return the repeated blocks of both towers, in forward order: what is checkpointed, compiled and sharded."""
        return self.visual.blocks() + self.transformer.blocks()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw all weights and set all buffers, in place.

        A model built on the meta device and emptied onto another begins as one built there under the same seed.
        """
        width = self.ln_final.weight.shape[0]
        self.visual.init_weights()
        self.transformer.init_weights(shrinking=True)
        draw_defaults(self.token_embedding)
        draw_defaults(self.ln_final)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)
        if self.text_projection_bias is not None:
            nn.init.zeros_(self.text_projection_bias)
        nn.init.constant_(self.logit_scale, math.log(1 / self.config.temperature))
        if self.logit_bias is not None:
            nn.init.constant_(self.logit_bias, self.config.logit_bias or 0.0)

    @property
    def patch_draws(self) -> int:
        """Uniform numbers that patch dropout takes of a picture, one a patch; 0 without it."""
        tower = self.visual
        if isinstance(tower, VisionTransformer | MapVisionTransformer) and tower.patch_dropout:
            return tower.patches
        return 0

    def encode_image(self, images: Tensor, normalize: bool = False, kept: Tensor | None = None) -> Tensor:
        """Map normalised images `[B, 3, H, W]` to features `[B, D]`.

        With patch dropout `kept` has the numbers of the patches looked at in training `[B, K]`
        (`towers.vit.kept_patches`); without it they are drawn.
        """
        features = self.visual(images) if kept is None else self.visual(images, kept)
        return _unit(features) if normalize else features

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Map token ids `[B, L]`, `L <= context`, padded with 0 after the end token, to features `[B, D]`.

        Where attention is causal, columns of padding alone may be left out: the features do not change.
        Elsewhere they are put back to the whole context.
        """
        features = self._pooled_text(*self._text_trunk(tokens))
        return _unit(features) if normalize else features

    def forward(
        self, images: Tensor, tokens: Tensor, needs: frozenset[str] = POOLED, *, kept: Tensor | None = None
    ) -> Features:
        """Encode pairs: images `[B, 3, H, W]` and token ids `[B, L]` to unit `Features`; `kept`: `encode_image`.

        Those of `STATES` that are in `needs` are there too, and the rest of `needs` is not looked at.
        """
        image_states = text_states = None
        if "image_states" in needs:
            if isinstance(self.visual, VisionTransformer | MapVisionTransformer):
                grid = self.visual.trunk(images, kept)
            else:
                grid = self.visual.trunk(images)
            image, image_states = _unit(self.visual.pooled(grid)), self.visual.states(grid)
        else:
            image = self.encode_image(images, normalize=True, kept=kept)
        if "text_states" in needs:
            x, end = self._text_trunk(tokens)
            text, text_states = _unit(self._pooled_text(x, end)), self.ln_final(x)
        else:
            text = self.encode_text(tokens, normalize=True)
        return Features(image, text, self.logit_scale.exp(), self.logit_bias, image_states, text_states)

    def _text_trunk(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return all positions `[B, T, W]`, not yet normalised, and which of them is pooled `[B]`."""
        text = self.config.text
        if not text.causal or text.pool == "last":
            tokens = F.pad(tokens, (0, self.context_length - tokens.shape[1]))
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        end = torch.full_like(tokens[:, 0], -1) if text.pool == "last" else tokens.argmax(dim=-1)
        return self.transformer(x), end

    def _pooled_text(self, x: Tensor, end: Tensor) -> Tensor:
        x = self.ln_final(x[torch.arange(len(x), device=x.device), end]) @ self.text_projection
        return x if self.text_projection_bias is None else x + self.text_projection_bias


def create_model(
    config: str | ModelConfig, vocabulary: int = 49408, device: str | torch.device | None = None
) -> DualEncoder:
    """Build a dual encoder from sizes or from a known name, such as `ViT-B-32`, and draw its weights.

    Args:
        config: sizes, or a key of `MODELS`.
        vocabulary: token ids lie in `[0, vocabulary)`.
        device: where it is built; on `meta` nothing is drawn, which `to_empty` and `init_weights` make up for.

    Raises:
        UserError: no model has that name; the message names the nearest one.
    """
    sizes = sizes_of(config)
    place = torch.device(device) if device is not None else torch.get_default_device()
    with torch.device("meta"):
        model = DualEncoder(sizes, vocabulary)
    if place.type != "meta":
        model.to_empty(device=place)
        model.init_weights()
    return model


def check_image_size(model: DualEncoder, side: int, option: str) -> None:
    """Raise UserError if the model takes pictures of another side (pixels) than `option` asks for."""
    if model.image_size not in (None, side):
        raise UserError(f"{option}: {side} pixels, but the model takes pictures of {model.image_size}; set it to that")


def _image_tower(config: ModelConfig) -> ImageTower:
    vit, resnet, residual = config.vit, config.resnet, config.vision
    if vit is not None:
        sizes = (vit.image_size, vit.patch_size, vit.width, vit.layers, vit.heads)
        if vit.pool == "attention":
            return MapVisionTransformer(*sizes, activation=vit.activation, patch_dropout=config.patch_dropout)
        return VisionTransformer(
            *sizes, config.embed_dim, activation=vit.activation, patch_dropout=config.patch_dropout
        )
    if resnet is not None:
        return ModifiedResNet(
            resnet.layers,
            resnet.width,
            resnet.heads,
            config.embed_dim,
            resnet.image_size,
            group=config.statistics_group,
        )
    return ResidualTower(
        residual.widths,
        residual.depths,
        config.embed_dim,
        stem_stride=residual.stem_stride,
        pool_grid=residual.pool_grid,
        group=residual.statistics_group or config.statistics_group,
    )


def _unit(features: Tensor) -> Tensor:
    # Half precision loses the third digit of a cosine, which the temperature then multiplies by up to 100.
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
