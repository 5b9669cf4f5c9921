"""Training objectives, chosen by name: each turns one rank's features into that rank's share of the loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from infra.config import nearest
from infra.errors import UserError
from train.config import ObjectiveConfig
from train.model import STATES, DualEncoder, Features, ModelConfig
from train.models import sizes_of
from train.objectives.captioning import CaptioningObjective
from train.objectives.clip import ClipObjective
from train.objectives.siglip import SiglipObjective


class Objective(Protocol):
    """What the loop asks of an objective: a loss of all samples of a batch at once, such as one of their pairs.

    One with weights of its own (a text decoder, a masked-token head) is an `nn.Module` as well: they are trained,
    clipped and saved beside the model's, every rank holds them whole, and their gradients are averaged over ranks. Its
    `constrain` may change them, its losses may not; running statistics it may not have.

    Attributes:
        needs: fields of `Features` that its call reads, beside the pooled features and the scale. States
            (`model.STATES`) are then kept for all of a rank's samples at once, in micro batches too.
    """

    needs: ClassVar[frozenset[str]]

    def __call__(self, features: Features, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a loss whose gradient, averaged over ranks, is the whole batch's, and numbers to log.

        The numbers are means over this rank's samples. It may be called more than once a step, and every rank
        calls it equally often with equally many samples. It must read both towers' features, if only times 0.
        """
        ...

    def constrain(self, model: DualEncoder) -> None:
        """Bring parameters back into their allowed range after an optimiser step."""
        ...


@runtime_checkable
class OwnWeights(Protocol):
    """An objective whose own weights depend on the model's sizes."""

    def build(self, model: DualEncoder) -> None:
        """Draw them on the CPU, the same on every rank that stands at the same random state; called once."""
        ...


@runtime_checkable
class SampleSum(Protocol):
    """An objective with a second part, added to the first, that is a sum over samples: a loss of tokens, for one.

    It is computed micro batch by micro batch, on features in their graph, so no states are kept for the whole batch.

    Attributes:
        sample_needs: fields of `Features` that `of_samples` reads, beside those of every model.
    """

    sample_needs: ClassVar[frozenset[str]]

    def denominator(self, tokens: Tensor) -> Tensor:
        """Return what sums are divided by: of all ranks' texts `[B, L]`, divided by their number of ranks.

        Called once a step on every rank, with all of its texts; a scalar.
        """
        ...

    def of_samples(self, features: Features, tokens: Tensor, denominator: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the share of some of this rank's samples, and numbers to log that add up as it does.

        It runs in the towers' arithmetic, and may not talk to other ranks: they call it with other samples.
        """
        ...


def read_by_call(objective: Objective) -> frozenset[str]:
    """Return which states the objective's call reads."""
    return objective.needs & STATES


def read_by_samples(objective: Objective) -> frozenset[str]:
    """Return which states are read with the samples' graph in hand."""
    return (objective.needs | (objective.sample_needs if isinstance(objective, SampleSum) else frozenset())) & STATES


def check_needs(name: str, objective: Objective, model: ModelConfig) -> None:
    """Raise UserError where objective and model do not go together.

    A bias that is missing, or that no one reads; or a field that no model has.
    """
    unknown = (objective.needs | getattr(objective, "sample_needs", frozenset())) - set(Features._fields)
    if unknown:
        fields = ", ".join(Features._fields)
        raise UserError(f"objective.name: {name!r} needs {', '.join(sorted(unknown))}; a model has {fields}")
    has_bias, reads_bias = sizes_of(model).logit_bias is not None, "logit_bias" in objective.needs
    if reads_bias and not has_bias:
        raise UserError(f"objective.name: {name!r} needs a model with a bias; set model.logit_bias, to -10 for a start")
    if has_bias and not reads_bias:
        raise UserError(f"objective.name: {name!r} reads no bias, the model has one; take 'siglip' or another model")


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "clip": ClipObjective,
    "siglip": SiglipObjective,
    "captioning": CaptioningObjective,
}


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
