"""Models by name: open_clip's names, shapes and weights; building on the meta device."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from infra.config import essence, parse
from infra.errors import UserError
from train.config import RunConfig, written_down
from train.model import MODELS, ModelConfig, ViTConfig, create_model
from train.models import sizes_of
from train.towers.vit import kept_patches, only_kept

OPEN_CLIPS = [name for name, config in MODELS.items() if name.startswith(("ViT-", "RN")) and config.text.context == 77]
SMALL = ["ViT-nano", "RN-nano", "SigLIP-nano", "RN10-tiny"]


@pytest.mark.parametrize("name", OPEN_CLIPS)
def test_parameters_are_named_and_shaped_as_open_clips(peers: Any, name: str) -> None:
    """So state dicts load strictly, either way."""
    with torch.device("meta"):
        theirs = peers.open_clip_model(peers.OPEN_CLIP_FOLDER, name)
    ours = create_model(name, device="meta")
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }
    assert ours.text_projection.requires_grad


@pytest.mark.parametrize("name", SMALL)
def test_shapes_gradients_and_blocks(name: str) -> None:
    """Every parameter of a named model has its part in the features, and its blocks are all there."""
    torch.manual_seed(0)
    model = create_model(name, 50)
    tokens = torch.tensor([[48, 3, 49, 0], [48, 49, 0, 0]])
    side = model.image_size or 32
    features = model(torch.randn(2, 3, side, side), tokens)
    assert features.image.shape == features.text.shape == (2, model.config.embed_dim)
    assert (features.logit_bias is None) == (not name.startswith("SigLIP"))
    bias = 0 if features.logit_bias is None else features.logit_bias
    (features.logit_scale * features.image @ features.text.T + bias)[0].square().sum().backward()
    assert not [key for key, parameter in model.named_parameters() if parameter.grad is None]
    inside = {id(parameter) for block in model.blocks() for parameter in block.parameters()}
    named = [key for key, p in model.named_parameters() if "resblocks." in key or ".layer" in key]
    assert inside == {id(model.get_parameter(key)) for key in named}


@pytest.mark.parametrize("name", SMALL)
def test_meta_construction_begins_the_same(name: str) -> None:
    """Weights, buffers and the state of the generator after it."""
    torch.manual_seed(3)
    direct = create_model(name, 50)
    after = torch.rand(1)
    with torch.device("meta"):
        model = create_model(name, 50)
    assert {value.device.type for value in model.state_dict().values()} == {"meta"}
    torch.manual_seed(3)
    model.to_empty(device="cpu")
    model.init_weights()
    for key, value in direct.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    assert torch.equal(after, torch.rand(1))


def test_unknown_name_names_the_nearest() -> None:
    """A typing mistake."""
    with pytest.raises(UserError, match=r"no model is called 'ViT-B32' \(did you mean 'ViT-B-32'\?\)"):
        create_model("ViT-B32")


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"text": {"context": 32}, "embed_dim": 64}, "model.embed_dim, model.text.context: set beside model.name"),
        ({"vit": {"width": 64, "heads": 1}}, "model.vit.heads, model.vit.width: set beside"),
        ({"vision": {}}, "model.vision: set beside"),
    ],
)
def test_sizes_beside_a_name_are_refused(sizes: dict[str, Any], named: str) -> None:
    """They would be ignored, even those that are the defaults."""
    with pytest.raises(UserError, match=named) as caught:
        sizes_of(parse({"name": "ViT-B-32"} | sizes, ModelConfig, source="test"))
    assert "'ViT-B-32' has sizes of its own" in str(caught.value)


@pytest.mark.parametrize("name", ["ViT-nano", "RN-nano", "RN10-tiny"])
def test_a_configuration_written_down_whole_may_be_read_back(name: str) -> None:
    """As a run's `config.json` is, with every default; one of a version with fewer options too."""
    raw = ModelConfig(name=name, patch_dropout=0.0).model_dump(mode="json")
    assert "embed_dim" in raw
    assert sizes_of(parse(raw, ModelConfig, source="test")) == sizes_of(name)
    del raw["statistics_group"]
    assert sizes_of(parse(raw, ModelConfig, source="test")) == sizes_of(name)


def test_options_beside_a_name_count() -> None:
    """`patch_dropout` is no size."""
    given = ModelConfig(name="ViT-nano", patch_dropout=0.5, temperature=0.1)
    model = create_model(given, 50)
    assert model.config.embed_dim == 32
    assert model.visual.patch_dropout == 0.5
    torch.testing.assert_close(model.logit_scale.exp(), torch.tensor(10.0))


def test_an_option_that_does_not_fit_the_named_model_is_a_users_mistake() -> None:
    """A ResNet has no patches."""
    with pytest.raises(
        UserError, match=r"^model\.patch_dropout: for vision transformers alone, 'RN-nano' is none; set it to 0$"
    ):
        create_model(ModelConfig(name="RN-nano", patch_dropout=0.5), 50)


def test_patch_dropout_keeps_a_share_of_each_pictures_own_patches() -> None:
    """In training alone."""
    patches = torch.arange(2 * 8).view(2, 8, 1).float()
    kept = only_kept(patches, kept_patches(torch.rand(2, 8), 0.75), 0.75)
    assert kept.shape == (2, 2, 1)
    assert (kept[0] < 8).all()
    assert (kept[1] >= 8).all()
    assert len(set(kept.flatten().tolist())) == 4
    model = create_model(ModelConfig(name="ViT-nano", patch_dropout=0.5), 50)
    images = torch.randn(2, 3, 32, 32)
    assert not torch.equal(model.encode_image(images), model.encode_image(images))
    model.eval()
    assert torch.equal(model.encode_image(images), model.encode_image(images))


def test_padding_may_be_left_out() -> None:
    """Of a causal text tower it changes nothing; SigLIP's is given its whole context."""
    for name in ("ViT-nano", "SigLIP-nano"):
        model = create_model(name, 50)
        short = torch.tensor([[48, 3, 49]])
        whole = torch.nn.functional.pad(short, (0, model.context_length - 3))
        torch.testing.assert_close(model.encode_text(short), model.encode_text(whole))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"image_size": 30, "patch_size": 8}, "patches of 8 pixels do not divide"),
        ({"width": 30, "heads": 4}, "4 heads do not divide a width of 30"),
    ],
)
def test_sizes_that_do_not_divide_are_named(sizes: dict[str, int], message: str) -> None:
    """Both numbers."""
    with pytest.raises(ValueError, match=message):
        ViTConfig(**sizes)


@pytest.mark.parametrize(
    "model", [{"name": "SigLIP-nano"}, {"name": "SigLIP-nano", "temperature": 0.07}, {"embed_dim": 8}]
)
def test_a_named_model_is_the_same_once_its_configuration_was_written_down(model: dict[str, Any]) -> None:
    """A rank reads what the launcher wrote; the name's own temperature and bias are not overruled by defaults."""
    config = parse({"data": {"folder": "shards"}, "model": model}, RunConfig, source="run.toml")
    again = parse(json.loads(json.dumps(written_down(config))), RunConfig, source="config.json")
    assert sizes_of(again.model) == sizes_of(config.model)
    assert essence(again) == essence(config)
