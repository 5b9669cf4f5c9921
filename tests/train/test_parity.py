"""The same weights in Hugging Face's classes: features, logits and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from train import huggingface
from train.model import DualEncoder, ModelConfig, TextConfig, ViTConfig, create_model

VOCABULARY, CONTEXT, SIDE, BATCH = 120, 16, 32, 3


def model_of(kind: str) -> DualEncoder:
    """A small model with weights that are all random, biases and scales too."""
    if kind == "siglip":
        config = ModelConfig(name="SigLIP-nano")
    else:
        vit = ViTConfig(image_size=SIDE, patch_size=8, width=32, layers=3, heads=4, activation=kind)
        text = TextConfig(context=CONTEXT, width=24, layers=2, heads=2, activation=kind)
        config = ModelConfig(embed_dim=20, vit=vit, text=text)
    torch.manual_seed(0)
    model = create_model(config, VOCABULARY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def peer_of(model: DualEncoder) -> nn.Module:
    """The same model as Hugging Face has it."""
    settings = copy.deepcopy(huggingface.model_settings(model))
    siglip = huggingface.is_siglip(model.config)
    peer = SiglipModel(SiglipConfig(**settings)) if siglip else CLIPModel(CLIPConfig(**settings))
    peer.load_state_dict(huggingface.weights(model), strict=True)
    return peer


def pairs() -> tuple[Tensor, Tensor]:
    """Images `[B, 3, S, S]` and token ids `[B, L]`, ends at different places."""
    torch.manual_seed(1)
    images = torch.randn(BATCH, 3, SIDE, SIDE)
    tokens = torch.randint(1, VOCABULARY - 2, (BATCH, CONTEXT))
    for row, length in zip(tokens, (CONTEXT, 9, 5), strict=True):
        row[length - 1], row[length:] = VOCABULARY - 1, 0
    return images, tokens


@pytest.mark.parametrize("kind", ["gelu", "quick_gelu", "siglip"])
def test_features_logits_and_gradients_are_those_of_hugging_face(kind: str) -> None:
    """To 1e-5 in float32."""
    model = model_of(kind)
    peer = peer_of(model)
    images, tokens = pairs()
    theirs = peer(input_ids=tokens, pixel_values=images, return_dict=True)
    features = model(images, tokens)
    torch.testing.assert_close(features.image, theirs.image_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(features.text, theirs.text_embeds, rtol=0, atol=1e-5)
    logits = features.logit_scale * features.image @ features.text.T
    if features.logit_bias is not None:
        logits = logits + features.logit_bias
    torch.testing.assert_close(logits, theirs.logits_per_image, rtol=1e-5, atol=1e-5)
    target = torch.arange(BATCH)
    nn.functional.cross_entropy(logits, target).backward()
    nn.functional.cross_entropy(theirs.logits_per_image, target).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    expected = {name: parameter.grad for name, parameter in peer.named_parameters()}
    for name, gradient in huggingface.weights(model).items():
        wanted = torch.zeros_like(gradient) if expected[name] is None else expected[name]
        torch.testing.assert_close(
            gradient, wanted, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_unnormalised_features_are_those_of_hugging_face() -> None:
    """`encode_image` and `encode_text` without `normalize`."""
    model = model_of("quick_gelu")
    images, tokens = pairs()
    with torch.no_grad():
        theirs = peer_of(model)(input_ids=tokens, pixel_values=images, return_dict=True)
        ours = (model.encode_image(images), model.encode_text(tokens))
    torch.testing.assert_close(ours[0], theirs.vision_model_output.pooler_output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1], theirs.text_model_output.pooler_output, rtol=1e-5, atol=1e-5)
