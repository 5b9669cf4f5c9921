"""A dual encoder in the words of Hugging Face's CLIPModel and SiglipModel: names of weights, sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infra.errors import UserError
from train.model import DualEncoder
from train.model_config import ModelConfig

ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}

BLOCK_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
SHARED_NAMES = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "logit_scale": "logit_scale",
}
CLIP_NAMES = {
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.proj": "visual_projection.weight",
}
SIGLIP_NAMES = {
    "logit_bias": "logit_bias",
    "text_projection": "text_model.head.weight",
    "text_projection_bias": "text_model.head.bias",
    "visual.conv1.bias": "vision_model.embeddings.patch_embedding.bias",
    "visual.attn_pool.probe": "vision_model.head.probe",
    "visual.attn_pool.in_proj_weight": "vision_model.head.attention.in_proj_weight",
    "visual.attn_pool.in_proj_bias": "vision_model.head.attention.in_proj_bias",
    "visual.attn_pool.out_proj.weight": "vision_model.head.attention.out_proj.weight",
    "visual.attn_pool.out_proj.bias": "vision_model.head.attention.out_proj.bias",
    "visual.attn_pool.ln.weight": "vision_model.head.layernorm.weight",
    "visual.attn_pool.ln.bias": "vision_model.head.layernorm.bias",
    "visual.attn_pool.mlp.c_fc.weight": "vision_model.head.mlp.fc1.weight",
    "visual.attn_pool.mlp.c_fc.bias": "vision_model.head.mlp.fc1.bias",
    "visual.attn_pool.mlp.c_proj.weight": "vision_model.head.mlp.fc2.weight",
    "visual.attn_pool.mlp.c_proj.bias": "vision_model.head.mlp.fc2.bias",
}
TRANSPOSED = ("text_projection", "visual.proj")
"""Matrices that OpenAI multiplies from the right."""


def is_siglip(config: ModelConfig) -> bool:
    """Tell which of the two classes has a place for these sizes: SiglipModel (True) or CLIPModel.

    Raises:
        UserError: neither has; the message says why.
    """
    vit, text = config.vit, config.text
    if vit is None:
        raise UserError(
            "no class of Hugging Face's holds a dual encoder with a ResNet: export it as open_clip, or a ViT"
        )
    pooled = (vit.pool == "attention", not text.causal, text.pool == "last", text.projection_bias)
    like_siglip = (*pooled, config.logit_bias is not None, text.epsilon == 1e-6)
    if all(like_siglip):
        return True
    like_clip = (vit.pool == "class", text.causal, text.pool == "end", not text.projection_bias)
    if not all(like_clip) or config.logit_bias is not None:
        raise UserError(
            "no class of Hugging Face's holds a model between CLIP and SigLIP: vit.pool, text.causal, text.pool, "
            "text.projection_bias, text.epsilon and logit_bias must all be those of one of the two"
        )
    return False


def weights(model: DualEncoder) -> dict[str, Tensor]:
    """Return the model's weights under Hugging Face's names, in its shapes. Raises UserError as `is_siglip`."""
    siglip = is_siglip(model.config)
    names = SHARED_NAMES | (SIGLIP_NAMES if siglip else CLIP_NAMES)
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        tower, block, rest = name.partition("transformer.resblocks.")
        if block:
            number, _, inner = rest.partition(".")
            layer = f"{'vision' if tower else 'text'}_model.encoder.layers.{number}"
            found |= {f"{layer}.{key}": part for key, part in _block_weights(inner, value)}
        else:
            found[names[name]] = value.T if name in TRANSPOSED else value
    if siglip:
        for name in ("logit_scale", "logit_bias"):
            found[name] = found[name].reshape(1)
        found["vision_model.head.probe"] = found["vision_model.head.probe"].reshape(1, 1, -1)
    return {name: value.contiguous() for name, value in found.items()}


def _block_weights(inner: str, value: Tensor) -> list[tuple[str, Tensor]]:
    if inner.startswith("attn.in_proj_"):
        kind = inner.removeprefix("attn.in_proj_")
        return [(f"self_attn.{part}_proj.{kind}", rows) for part, rows in zip("qkv", value.chunk(3), strict=True)]
    layer, _, kind = inner.rpartition(".")
    return [(f"{BLOCK_NAMES[layer]}.{kind}", value)]


def model_settings(model: DualEncoder) -> dict[str, Any]:
    """Return the content of `config.json`. Raises UserError as `is_siglip`."""
    config = model.config
    siglip = is_siglip(config)
    assert config.vit is not None
    text, vit, vocabulary = config.text, config.vit, model.token_embedding.num_embeddings
    epsilon = text.epsilon if siglip else 1e-5
    projected = {"projection_size" if siglip else "projection_dim": config.embed_dim}
    kind = "siglip" if siglip else "clip"
    return {
        "architectures": ["SiglipModel" if siglip else "CLIPModel"],
        "model_type": kind,
        **({} if siglip else {"projection_dim": config.embed_dim}),
        "logit_scale_init_value": float(model.logit_scale.detach()),
        "torch_dtype": str(torch.float32).removeprefix("torch."),
        "text_config": {
            "model_type": f"{kind}_text_model",
            "vocab_size": vocabulary,
            "max_position_embeddings": text.context,
            "layer_norm_eps": text.epsilon,
            "pad_token_id": 0,
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
            **_sizes(text.width, text.layers, text.heads, text.activation),
            **projected,
        },
        "vision_config": {
            "model_type": f"{kind}_vision_model",
            "image_size": vit.image_size,
            "patch_size": vit.patch_size,
            "layer_norm_eps": epsilon,
            **_sizes(vit.width, vit.layers, vit.heads, vit.activation),
            **({} if siglip else projected),
        },
    }


def _sizes(width: int, layers: int, heads: int, activation: str) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": ACTIVATIONS[activation],
    }
