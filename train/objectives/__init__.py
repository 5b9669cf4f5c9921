"""Training objectives, chosen by name: each turns one rank's features into that rank's share of the loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

from torch import Tensor

from infra.config import nearest
from infra.errors import UserError
from train.config import ObjectiveConfig
from train.model import DualEncoder, Features, ModelConfig
from train.models import sizes_of
from train.objectives.clip import ClipObjective
from train.objectives.siglip import SiglipObjective


class Objective(Protocol):
    """What the loop asks of an objective.

    One with weights of its own (a text decoder, a masked-token head) is an `nn.Module` as well: its parameters
    are trained and saved beside the model's, and their gradients are averaged over ranks like the model's.

    Attributes:
        needs: fields of `Features` beside the pooled features and the scale that must be there, such as
            `logit_bias`, or the states of single tokens or patches for an objective that reads those.
    """

    needs: ClassVar[frozenset[str]]

    def __call__(self, features: Features, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a loss whose gradient, averaged over ranks, is the whole batch's, and numbers to log.

        The numbers are means over this rank's samples. It may be called more than once a step, and every rank
        calls it equally often with equally many samples.
        """
        ...

    def constrain(self, model: DualEncoder) -> None:
        """Bring parameters back into their allowed range after an optimiser step."""
        ...


def check_needs(name: str, objective: Objective, model: ModelConfig) -> None:
    """Raise UserError where objective and model do not go together: a bias that is missing, or that no one reads."""
    has_bias, reads_bias = sizes_of(model).logit_bias is not None, "logit_bias" in objective.needs
    if reads_bias and not has_bias:
        raise UserError(f"objective.name: {name!r} needs a model with a bias; set model.logit_bias, to -10 for a start")
    if has_bias and not reads_bias:
        raise UserError(
            f"objective.name: {name!r} reads no bias, the model has one; take 'siglip' or another model"
        )


OBJECTIVES: dict[str, Callable[..., Objective]] = {"clip": ClipObjective, "siglip": SiglipObjective}


def create_objective(name: str, **options: Any) -> Objective:
    """Build an objective by name, from options of `ObjectiveConfig`.

    Raises:
        UserError: no objective has that name (the message names the nearest), or it does not know an option that
            is set to other than its default.
    """
    if name not in OBJECTIVES:
        raise UserError(f"objective.name: no objective is called {name!r}{nearest(name, list(OBJECTIVES))}")
    known = inspect.signature(OBJECTIVES[name]).parameters
    for option, value in options.items():
        if option not in known and value != ObjectiveConfig.model_fields[option].default:
            raise UserError(f"objective.{option}: {name!r} has no such option; leave it out")
    return OBJECTIVES[name](**{option: value for option, value in options.items() if option in known})
