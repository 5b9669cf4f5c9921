"""Gradient accumulation with cached features: what it replays, and what it refuses."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infra.errors import UserError
from train.accumulate import forward_backward
from train.config import RunConfig
from train.gradients import clip_gradients
from train.model import DualEncoder, Features, ModelConfig, TextConfig, VisionConfig, create_model
from train.objectives import create_objective
from train.objectives.clip import ClipObjective
from train.parallel import ParallelConfig
from train.state import TrainingState
from train.statistics import check_groups

BATCH, MICRO = 8, 2


class WithDropout(DualEncoder):
    """Features that depend on the random state."""

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """As before, a third of it left out."""
        x = F.dropout(super().encode_text(tokens), 0.3, self.training)
        return F.normalize(x, dim=1) if normalize else x


def state_of(model: DualEncoder, micro_batch: int) -> TrainingState:
    """A run without data or optimiser."""
    config = RunConfig(parallel=ParallelConfig(micro_batch=micro_batch, precision="float32"))
    parts: dict[str, Any] = dict.fromkeys(field.name for field in fields(TrainingState) if field.default is MISSING)
    parts |= {"config": config, "model": model, "parallel": model, "objective": create_objective("clip")}
    return TrainingState(**parts | {"dtype": torch.float32, "device": torch.device("cpu")})


def sizes(group: int = 2) -> ModelConfig:
    """Small towers."""
    vision = VisionConfig(widths=(4,), depths=(1,), statistics_group=group)
    return ModelConfig(embed_dim=8, vision=vision, text=TextConfig(context=6, width=8, layers=1, heads=2))


def batch() -> tuple[Tensor, Tensor]:
    """Images and tokens."""
    draws = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 3, 8, 8, generator=draws, dtype=torch.float64)
    return images, torch.randint(1, 20, (BATCH, 6), generator=draws)


def test_dropout_is_the_same_both_times() -> None:
    """Gradients are those of one graph over the same micro batches, drawn in the same order."""
    torch.manual_seed(0)
    model = WithDropout(sizes(), 20).double()
    model.init_weights()
    images, tokens = batch()
    torch.manual_seed(4)
    parts = [model(*part) for part in zip(images.split(MICRO), tokens.split(MICRO), strict=True)]
    features = Features(torch.cat([p.image for p in parts]), torch.cat([p.text for p in parts]), parts[0].logit_scale)
    loss, _ = create_objective("clip")(features, tokens)
    loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    after = torch.get_rng_state()
    model.zero_grad()

    torch.manual_seed(4)
    found, _ = forward_backward(state_of(model, MICRO), images, tokens)
    torch.testing.assert_close(found, loss.detach(), rtol=0, atol=1e-12)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), after), "the next step draws on where one graph would have left off"


def test_the_next_step_draws_on_after_the_objective() -> None:
    """What the objective has drawn, after the towers' first pass, is not drawn again."""
    after = []

    class Drawing(ClipObjective):
        def __call__(self, features: Features, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            found = super().__call__(features._replace(image=F.dropout(features.image, 0.1)), tokens)
            after.append(torch.get_rng_state())
            return found

    torch.manual_seed(0)
    state = state_of(create_model(sizes(), 20).double(), MICRO)
    state.objective = Drawing()
    forward_backward(state, *batch())
    assert len(after) == 1
    assert torch.equal(torch.get_rng_state(), after[0])


@pytest.mark.parametrize("micro_batch", [MICRO, 6])
def test_running_statistics_take_one_step(micro_batch: int) -> None:
    """Encoding twice in parts updates them as encoding once in whole does."""
    images, tokens = batch()
    buffers = []
    for size in (0, micro_batch):
        torch.manual_seed(0)
        model = create_model(sizes(), 20).double()
        forward_backward(state_of(model, size), images, tokens)
        buffers.append(dict(model.named_buffers()))
    for name, value in buffers[0].items():
        torch.testing.assert_close(buffers[1][name], value, rtol=0, atol=1e-12)


def test_graph_of_one_micro_batch_at_a_time() -> None:
    """No more samples than asked for go through the towers at once."""
    model = create_model(sizes(), 20).double()
    seen: list[int] = []
    model.visual.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    forward_backward(state_of(model, MICRO), *batch())
    assert seen == [MICRO] * (2 * BATCH // MICRO)


@pytest.mark.parametrize(("group", "named"), [(4, 4), (0, BATCH)])
def test_cut_groups_are_refused(group: int, named: int) -> None:
    """Batch statistics over half a group would be others."""
    with pytest.raises(UserError, match=rf"parallel.micro_batch: 2 samples are not whole groups of {named}"):
        check_groups(create_model(sizes(group), 20), MICRO, BATCH)
    check_groups(create_model(sizes(2), 20), MICRO, BATCH)
    check_groups(create_model(sizes(group), 20), BATCH, BATCH)


@pytest.mark.parametrize("max_norm", [0.0, 0.1, 1e6])
def test_clipping_is_that_of_torch(max_norm: float) -> None:
    """On one process: the same norm and the same gradients, to the bit."""
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(())), nn.Parameter(torch.randn(7))]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    for one, other in zip(ours, theirs, strict=True):
        one.grad = torch.randn_like(one)
        other.grad = one.grad.clone()
    norm = clip_gradients(ours, max_norm)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(theirs, max_norm or float("inf")))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]
