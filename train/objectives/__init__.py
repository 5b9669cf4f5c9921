"""Training objectives, chosen by name: each turns one rank's features into that rank's share of the loss."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from infra.config import nearest
from infra.errors import UserError
from train.model import DualEncoder, Features
from train.objectives.clip import ClipObjective


class Objective(Protocol):
    """What the loop asks of an objective."""

    def __call__(self, features: Features, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a loss whose gradient, averaged over ranks, is the whole batch's, and numbers to log."""
        ...

    def constrain(self, model: DualEncoder) -> None:
        """Bring parameters back into their allowed range after an optimiser step."""
        ...


OBJECTIVES: dict[str, type[ClipObjective]] = {"clip": ClipObjective}


def create_objective(name: str, **options: Any) -> Objective:
    """Build an objective by name. Raises UserError for an unknown name, naming the nearest."""
    if name not in OBJECTIVES:
        raise UserError(f"objective.name: no objective is called {name!r}{nearest(name, list(OBJECTIVES))}")
    return OBJECTIVES[name](**options)
