"""The captioning objective: its loss, what it learns, and a run with it that goes on as if never stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from infra.errors import UserError
from train.config import RunConfig
from train.export import export
from train.launch import prepare
from train.loop import fit, resumed, train_step
from train.model import MODELS, Features, create_model
from train.objectives import check_needs, create_objective
from train.objectives.captioning import CaptioningObjective
from train.state import TrainingState, build

MakeConfig = Callable[..., RunConfig]
END = 29
TINY = {"name": "captioning", "decoder_width": 16, "decoder_heads": 2}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Tensors this small only wait for more threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def built(name: str = "ViT-nano") -> tuple[Any, CaptioningObjective]:
    """A model and its objective, in float64."""
    torch.manual_seed(0)
    model = create_model(name, END + 1)
    objective = create_objective(**TINY)
    assert isinstance(objective, CaptioningObjective)
    objective.build(model)
    return model.double(), objective.double()


def captions(length: int = 6) -> Tensor:
    """Three texts of different lengths, with a token 0 in one of them."""
    rows = [[1, 7, 0, 8, END], [1, 5, END], [1, 9, 9, END]]
    return torch.tensor([row + [0] * (length - len(row)) for row in rows])


def encoded(name: str = "ViT-nano") -> tuple[Features, CaptioningObjective]:
    """Three pictures and their captions, with the states of the pictures."""
    model, objective = built(name)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    return model(images, captions(), objective.sample_needs), objective


def caption_loss(objective: CaptioningObjective, features: Features, tokens: Tensor) -> Tensor:
    return objective.of_samples(features, tokens, objective.denominator(tokens))[1]["caption_loss"]


@pytest.mark.parametrize("name", ["ViT-nano", "RN-nano", "RN10-tiny"])
def test_loss_is_the_mean_over_tokens(name: str) -> None:
    """Text by text and token by token, each from those before it alone; the end is told, padding is not."""
    features, objective = encoded(name)
    states, losses = features.image_states, []
    assert states is not None
    for number, length in enumerate((5, 3, 4)):
        for place in range(1, length):
            before = captions()[number : number + 1, :place]
            logits = objective.decoder.logits(objective.decoder(before, states[number : number + 1])[:, -1])
            losses.append(F.cross_entropy(logits, captions()[number, place : place + 1]))
    loss, numbers = objective.of_samples(features, captions(), objective.denominator(captions()))
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(numbers["caption_loss"], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(loss, 2 * expected, rtol=0, atol=1e-12)


def test_padding_makes_no_difference() -> None:
    features, objective = encoded()
    long = caption_loss(objective, features, captions(9))
    torch.testing.assert_close(long, caption_loss(objective, features, captions()), rtol=0, atol=1e-12)


def test_the_decoder_reads_the_picture() -> None:
    """Other pictures give another loss, and its gradient reaches the image tower, but not the text tower."""
    features, objective = encoded()
    assert features.image_states is not None
    swapped = features._replace(image_states=features.image_states.roll(1, 0))
    assert caption_loss(objective, swapped, captions()) != caption_loss(objective, features, captions())
    loss, _ = objective.of_samples(features, captions(), objective.denominator(captions()))
    image, text = torch.autograd.grad(loss, [features.image_states, features.text], allow_unused=True)
    assert image.abs().max() > 0
    assert text is None


@pytest.mark.parametrize("name", ["ViT-nano", "RN-nano", "RN10-tiny", "SigLIP-nano"])
def test_states_beside_the_same_features(name: str) -> None:
    """Whoever asks for states gets them in the widths that are told, and the features of whoever does not."""
    model = create_model(name, END + 1).eval()
    images, tokens = torch.randn(2, 3, 32, 32), captions()[:2]
    plain, more = model(images, tokens), model(images, tokens, frozenset({"image_states", "text_states"}))
    assert plain.image_states is None
    assert plain.text_states is None
    assert torch.equal(plain.image, more.image)
    assert torch.equal(plain.text, more.text)
    assert more.image_states.shape[::2] == (2, model.visual.state_width)
    context = tokens.shape[1] if MODELS[name].text.causal else model.context_length
    assert more.text_states.shape == (2, context, MODELS[name].text.width)


def config_of(make_config: MakeConfig, **tables: Any) -> RunConfig:
    return make_config(objective=TINY, **tables)


def run_here(config: RunConfig, run: Path, stop_after: int = 0) -> TrainingState:
    """Train in this process, to the end or so many steps far."""
    if not (run / "config.json").exists():
        prepare(config, run, 1)
    state = resumed(build(config, run), run)
    fit(state, run, lambda: bool(stop_after) and state.step >= stop_after)
    return state


def test_resumes_to_the_bit_and_exports_without_it(tmp_path: Path, make_config: MakeConfig) -> None:
    """Decoder and moments are in the checkpoint, in micro batches too; an export has the two towers alone."""
    small = {"data": {"image_size": 32}, "model": {"name": "ViT-nano"}}
    config = config_of(make_config, parallel={"micro_batch": 4}, **small)
    whole = run_here(config, tmp_path / "whole").tensors()
    run_here(config, tmp_path / "twice", stop_after=5)
    again = run_here(config, tmp_path / "twice").tensors()
    assert whole.keys() == again.keys()
    assert [name for name, value in whole.items() if not torch.equal(value, again[name])] == []
    decoder = "objective.decoder.token_embedding.weight"
    assert {decoder, f"optimizer.{decoder}.exp_avg", "optimizer.token_embedding.weight.exp_avg"} <= whole.keys()
    export(tmp_path / "twice", "open_clip", tmp_path / "out")
    exported = load_file(tmp_path / "out" / "open_clip_model.safetensors")
    assert exported.keys() == create_model("ViT-nano", 320).state_dict().keys()


def test_another_decoders_checkpoint_is_refused(tmp_path: Path, make_config: MakeConfig) -> None:
    config, run = config_of(make_config), tmp_path / "run"
    run_here(config, run, stop_after=1)
    other = config.model_copy(update={"objective": config.objective.model_copy(update={"decoder_width": 8})})
    with pytest.raises(UserError, match=r"another model: objective\.decoder.* is .* there, .* here"):
        resumed(build(other, run), run)


def test_a_few_steps_lower_both_losses(tmp_path: Path, make_config: MakeConfig) -> None:
    """On one batch, again and again, decoder and towers learn."""
    config = config_of(make_config, optim={"warmup": "0 steps", "learning_rate": 0.01, "schedule": "constant"})
    prepare(config, tmp_path / "run", 1)
    state = build(config, tmp_path / "run")
    batches = iter(state.data)
    batch = next(batches)
    batches.close()  # type: ignore[attr-defined]
    numbers = [train_step(state, batch) for _ in range(40)]
    assert numbers[-1]["caption_loss"] < 0.5 * numbers[0]["caption_loss"]
    assert numbers[-1]["loss"] - 2 * numbers[-1]["caption_loss"] < numbers[0]["loss"] - 2 * numbers[0]["caption_loss"]


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(UserError, match=r"objective.decoder_heads: 5 heads do not divide decoder_width, 16"):
        create_objective("captioning", decoder_width=16, decoder_heads=5)


def test_other_objectives_know_no_decoder() -> None:
    with pytest.raises(UserError, match=r"objective.decoder_layers: 'clip' has no such option"):
        create_objective("clip", decoder_layers=3)


def test_what_no_model_has_is_named() -> None:
    """A field that an objective asks for in vain."""
    objective = create_objective("captioning")
    objective.sample_needs = frozenset({"audio_states"})  # type: ignore[misc,attr-defined]
    with pytest.raises(UserError, match=r"'mine' needs audio_states; a model has image, text, logit_scale"):
        check_needs("mine", objective, MODELS["ViT-nano"])
