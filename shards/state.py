"""A stream's state, as it comes from a checkpoint: looked at before anything is taken over from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from infra.errors import UserError


def checked(state: Mapping[str, Any], required: Iterable[str], optional: Iterable[str] = ()) -> dict[str, int]:
    """Return the `required` numbers of a state, and those `optional` ones that it has.

    Raises:
        UserError: one is missing or no whole number.
    """
    names = [*required, *(name for name in optional if name in state)]
    for name in names:
        if name not in state:
            raise UserError(f"stream state: it has no '{name}'; give the state_dict() of a stream of this kind")
        if not isinstance(state[name], int) or isinstance(state[name], bool):
            raise UserError(f"stream state: {name}: {state[name]!r} is no whole number; give what state_dict() gave")
    return {name: int(state[name]) for name in names}


def check_place(state: Mapping[str, int], steps_per_epoch: int) -> None:
    """Make sure that a state's epoch and step are there in the order. Raises UserError."""
    epoch, step = state["epoch"], state["step"]
    if epoch < 0 or not 0 <= step <= steps_per_epoch:
        raise UserError(
            f"stream state: step {step} of epoch {epoch}, where epochs count from 0 and have {steps_per_epoch} steps; "
            "give what state_dict() gave"
        )
