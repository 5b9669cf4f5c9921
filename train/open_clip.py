"""A dual encoder in the words of open_clip's configuration."""

from __future__ import annotations

from typing import Any

from infra.errors import UserError
from train.model import DualEncoder
from train.model_config import ModelConfig

EPSILON = 1e-5


def model_settings(model: DualEncoder) -> dict[str, Any]:
    """Return the `model_cfg` of `open_clip_config.json`.

    Raises:
        UserError: open_clip has no place for this model; the message says why.
    """
    config = model.config
    _check(config)
    text = config.text
    activations = {text.activation} | ({config.vit.activation} if config.vit else set())
    settings: dict[str, Any] = {
        "embed_dim": config.embed_dim,
        "vision_cfg": _vision(config),
        "text_cfg": {
            "context_length": text.context,
            "vocab_size": model.token_embedding.num_embeddings,
            "width": text.width,
            "heads": text.heads,
            "layers": text.layers,
            **({"norm_kwargs": {"eps": text.epsilon}} if text.epsilon != EPSILON else {}),
        },
    }
    if activations == {"quick_gelu"}:
        settings["quick_gelu"] = True
    if config.logit_bias is not None:
        settings["init_logit_bias"] = config.logit_bias
    return settings


def _vision(config: ModelConfig) -> dict[str, Any]:
    own: dict[str, Any]
    if config.vit is not None:
        vit = config.vit
        own = {"layers": vit.layers, "patch_size": vit.patch_size}
        return own | {"image_size": vit.image_size, "width": vit.width, "head_width": vit.width // vit.heads}
    assert config.resnet is not None
    resnet = config.resnet
    own = {"layers": list(resnet.layers), "patch_size": None}
    return own | {
        "image_size": resnet.image_size,
        "width": resnet.width,
        "head_width": resnet.width * 32 // resnet.heads,
    }


def _check(config: ModelConfig) -> None:
    text, vit = config.text, config.vit
    reason = ""
    if vit is None and config.resnet is None:
        reason = "its image tower is our own small residual one (RN10-*)"
    elif vit is not None and vit.pool == "attention":
        reason = "its image tower is SigLIP's, which open_clip takes from timm; export it as huggingface"
    elif not text.causal or text.pool == "last" or text.projection_bias:
        reason = "its text tower is SigLIP's"
    elif "gelu_tanh" in (text.activation, vit.activation if vit else "") or (
        vit is not None and vit.activation != text.activation
    ):
        reason = "both towers must have the same activation, gelu or quick_gelu"
    if reason:
        raise UserError(f"open_clip has no place for this model: {reason}")
