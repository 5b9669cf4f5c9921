"""SigLIP's sigmoid loss: its value on paper, what it asks of the model, and what is no option of it."""

from __future__ import annotations

import math

import pytest
import torch

from infra.errors import UserError
from train.config import ObjectiveConfig
from train.model import Features, create_model
from train.objectives import create_objective


def test_loss_of_a_batch_on_paper() -> None:
    """Two orthogonal pairs: each image has one yes at scale + bias and one no at bias, and the loss is an image's."""
    unit, scale, bias = torch.eye(2, dtype=torch.float64), 10.0, -4.0
    features = Features(unit, unit, torch.tensor(scale), torch.tensor(bias))
    loss, numbers = create_objective("siglip")(features, torch.arange(2)[:, None])
    assert loss.item() == pytest.approx(math.log1p(math.exp(-scale - bias)) + math.log1p(math.exp(bias)), rel=1e-12)
    assert numbers["accuracy"] == 1


def test_same_text_can_be_a_positive() -> None:
    """Two pictures of one caption with equal features: as negatives they cost a lot, as positives next to nothing."""
    both = torch.eye(2, dtype=torch.float64)[[0, 0, 1]]
    tokens = torch.tensor([[5, 9], [5, 9], [6, 9]])
    features = Features(both, both, torch.tensor(40.0), torch.tensor(-20.0))
    against, _ = create_objective("siglip")(features, tokens)
    shared, _ = create_objective("siglip", same_text="positive")(features, tokens)
    assert against.item() == pytest.approx(2 * 20 / 3, rel=1e-6)
    assert shared.item() < 1e-8


def test_a_model_without_a_bias_is_named() -> None:
    """The objective says what it needs, and fails in one line where it is not there."""
    objective = create_objective("siglip")
    assert "logit_bias" in objective.needs
    with pytest.raises(UserError, match=r"objective\.name: 'siglip' needs a model with a logit bias"):
        objective(Features(torch.eye(2), torch.eye(2), torch.tensor(1.0)), torch.arange(2)[:, None])


def test_an_option_of_another_objective_is_named() -> None:
    """At its default it may be there, since the configuration has one table for all."""
    create_objective(**ObjectiveConfig(name="siglip", same_text="positive", tile=64).model_dump())
    with pytest.raises(UserError, match=r"objective\.label_smoothing: 'siglip' has no such option"):
        create_objective(**ObjectiveConfig(name="siglip", label_smoothing=0.1).model_dump())


def test_the_scale_is_free() -> None:
    """No bound is set to it after a step."""
    model = create_model("RN10-tiny", 100)
    with torch.no_grad():
        model.logit_scale.fill_(7.0)
    create_objective("siglip").constrain(model)
    assert model.logit_scale.item() == 7.0
