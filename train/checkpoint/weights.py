"""Weights of a checkpoint into a model, or what differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from infra.errors import UserError

NAMED_TENSORS = 4
"""Tensors that an error about another model names."""


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Put weights into a model, every tensor of it.

    Raises:
        UserError: they belong to another model; the message names tensors that differ.
    """
    here = {name: list(value.shape) for name, value in model.state_dict().items()}
    check_same(here, {name: list(value.shape) for name, value in weights.items()}, source)
    model.load_state_dict(weights)


def check_same(here: Mapping[str, Sequence[int]], there: Mapping[str, Sequence[int]], source: str) -> None:
    """Compare shapes by name. Raises UserError: they are not the same model's; it names tensors that differ."""
    problems = [f"{name} is missing" for name in here.keys() - there.keys()]
    problems += [f"{name} is unknown" for name in there.keys() - here.keys()]
    for name in here.keys() & there.keys():
        if list(here[name]) != list(there[name]):
            problems.append(f"{name} is {list(there[name])} there, {list(here[name])} here")
    if problems:
        shown = "; ".join(sorted(problems)[:NAMED_TENSORS])
        more = f"; and {len(problems) - NAMED_TENSORS} more" if len(problems) > NAMED_TENSORS else ""
        raise UserError(f"{source}: a checkpoint of another model: {shown}{more}")
