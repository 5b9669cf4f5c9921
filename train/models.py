"""Known models, under open_clip's names and with its sizes; small ones of our own for one CPU."""

from __future__ import annotations

from typing import Any

from infra.config import Config, nearest, parse
from infra.errors import UserError
from train.model_config import ModelConfig, ResNetConfig, TextConfig, VisionConfig, ViTConfig

HEAD_WIDTH = 64
"""Channels of an attention head in every model of OpenAI's and SigLIP's B and L."""


def _text(width: int) -> TextConfig:
    return TextConfig(context=77, width=width, layers=12, heads=width // HEAD_WIDTH)


def _vit(embed_dim: int, width: int, layers: int, text: int, patch: int, side: int = 224) -> ModelConfig:
    tower = ViTConfig(image_size=side, patch_size=patch, width=width, layers=layers, heads=width // HEAD_WIDTH)
    return ModelConfig(embed_dim=embed_dim, vit=tower, text=_text(text))


def _resnet(
    embed_dim: int, layers: tuple[int, int, int, int], text: int, width: int = 64, side: int = 224
) -> ModelConfig:
    tower = ResNetConfig(image_size=side, layers=layers, width=width, heads=width * 32 // HEAD_WIDTH)
    return ModelConfig(embed_dim=embed_dim, resnet=tower, text=_text(text))


def _siglip(width: int, layers: int, side: int) -> ModelConfig:
    """Zhai et al. 2023, section 4: temperature 1/10 and bias -10 at first, no causal mask, the last token pooled."""
    sizes: dict[str, Any] = {"width": width, "layers": layers, "heads": width // HEAD_WIDTH}
    vision = ViTConfig(image_size=side, patch_size=16, pool="attention", activation="gelu_tanh", **sizes)
    text = TextConfig(
        context=64, causal=False, pool="last", projection_bias=True, epsilon=1e-6, activation="gelu_tanh", **sizes
    )
    return ModelConfig(embed_dim=width, vit=vision, text=text, temperature=0.1, logit_bias=-10.0)


def _quick(config: ModelConfig) -> ModelConfig:
    """The same model with the activation that OpenAI's weights were trained with."""
    text = config.text.model_copy(update={"activation": "quick_gelu"})
    vit = config.vit.model_copy(update={"activation": "quick_gelu"}) if config.vit else None
    return config.model_copy(update={"text": text, "vit": vit})


_CLIP: dict[str, ModelConfig] = {
    "RN50": _resnet(1024, (3, 4, 6, 3), 512),
    "RN101": _resnet(512, (3, 4, 23, 3), 512),
    "RN50x4": _resnet(640, (4, 6, 10, 6), 640, width=80, side=288),
    "RN50x16": _resnet(768, (6, 8, 18, 8), 768, width=96, side=384),
    "RN50x64": _resnet(1024, (3, 15, 36, 10), 1024, width=128, side=448),
    "ViT-S-32": _vit(384, 384, 12, 384, patch=32),
    "ViT-S-16": _vit(384, 384, 12, 384, patch=16),
    "ViT-B-32": _vit(512, 768, 12, 512, patch=32),
    "ViT-B-16": _vit(512, 768, 12, 512, patch=16),
    "ViT-L-14": _vit(768, 1024, 24, 768, patch=14),
    "ViT-L-14-336": _vit(768, 1024, 24, 768, patch=14, side=336),
}

MODELS: dict[str, ModelConfig] = {
    **_CLIP,
    **{f"{name}-quickgelu": _quick(config) for name, config in _CLIP.items() if "-S-" not in name},
    "ViT-B-16-SigLIP": _siglip(768, 12, 224),
    "ViT-B-16-SigLIP-256": _siglip(768, 12, 256),
    "ViT-B-16-SigLIP-384": _siglip(768, 12, 384),
    "ViT-L-16-SigLIP-256": _siglip(1024, 24, 256),
    "ViT-L-16-SigLIP-384": _siglip(1024, 24, 384),
    "ViT-Ti-16": ModelConfig(
        embed_dim=192,
        vit=ViTConfig(image_size=64, patch_size=16, width=192, layers=6, heads=3),
        text=TextConfig(context=32, width=192, layers=4, heads=3),
    ),
    "ViT-nano": ModelConfig(
        embed_dim=32,
        vit=ViTConfig(image_size=32, patch_size=8, width=32, layers=2, heads=2),
        text=TextConfig(context=16, width=32, layers=2, heads=2),
    ),
    "SigLIP-nano": ModelConfig(
        embed_dim=32,
        vit=ViTConfig(
            image_size=32, patch_size=8, width=32, layers=2, heads=2, pool="attention", activation="gelu_tanh"
        ),
        text=TextConfig(
            context=16, width=32, layers=2, heads=2, causal=False, pool="last", projection_bias=True, epsilon=1e-6
        ),
        temperature=0.1,
        logit_bias=-10.0,
    ),
    "RN-nano": ModelConfig(
        embed_dim=32,
        resnet=ResNetConfig(image_size=32, layers=(1, 1, 1, 1), width=8, heads=4),
        text=TextConfig(context=16, width=32, layers=2, heads=2),
    ),
    "RN10-small": ModelConfig(),
    "RN10-tiny": ModelConfig(
        embed_dim=32,
        vision=VisionConfig(widths=(8, 16), depths=(1, 1)),
        text=TextConfig(context=16, width=32, layers=1, heads=2),
    ),
}

RUN_OPTIONS = ("weights", "temperature", "logit_bias", "statistics_group", "patch_dropout")
"""Options of a model that are no sizes: given beside a name, they count."""


def sizes_of(config: str | ModelConfig) -> ModelConfig:
    """Return the sizes that a name or a configuration stands for.

    Raises:
        UserError: no model has that name (the message names the nearest one), an option beside it does not fit it,
            or sizes are set beside it.
    """
    given = ModelConfig(name=config) if isinstance(config, str) else config
    if not given.name:
        return given
    if given.name not in MODELS:
        raise UserError(f"model.name: no model is called {given.name!r}{nearest(given.name, list(MODELS))}")
    ignored = _sizes_beside_name(given)
    if ignored:
        raise UserError(
            f"{', '.join(ignored)}: set beside model.name, but {given.name!r} has sizes of its own; leave them out, "
            "or the name"
        )
    known = MODELS[given.name]
    changes = {option: getattr(given, option) for option in RUN_OPTIONS if option in given.model_fields_set}
    if given.patch_dropout and known.vit is None:
        raise UserError(f"model.patch_dropout: for vision transformers alone, {given.name!r} is none; set it to 0")
    sizes = {name: getattr(known, name) for name in known.model_fields_set}
    return parse(sizes | changes, ModelConfig, source=f"model {given.name}")


def _sizes_beside_name(given: ModelConfig) -> list[str]:
    """Name the options that were set and that the name would overrule, such as `model.text.context`."""
    if {"vit", "resnet"} <= given.model_fields_set:
        return []  # no one may set both: all fields were written down, as a run's config.json has them
    found = []
    for name in sorted(given.model_fields_set - {"name", *RUN_OPTIONS}):
        value = getattr(given, name)
        inner = sorted(value.model_fields_set) if isinstance(value, Config) else []
        found += [f"model.{name}.{one}" for one in inner] or [f"model.{name}"]
    return found
