"""What of a run's configuration may change between two starts, when that is asked for."""

from __future__ import annotations

from typing import Any

from infra.config import differences, essence
from infra.errors import UserError
from train.config import RunConfig

CHANGEABLE = ("learning_rate", "weight_decay", "beta1", "beta2", "epsilon")
"""Options of `optim` that a step reads anew. What bends the schedule, the data or the model makes another run."""


def changeable(config: RunConfig) -> dict[str, Any]:
    """Return what may change, with its values."""
    return {name: getattr(config.optim, name) for name in CHANGEABLE}


def changes(before: dict[str, Any], config: RunConfig) -> list[str]:
    """Name what is not as in `before`, which `changeable` gave: `optim.learning_rate: 0.001 there, 0.0001 now`."""
    return differences(before, changeable(config), "optim.")


def check_same_run(before: RunConfig, config: RunConfig, where: str, *, may_change: bool) -> bool:
    """Tell whether a configuration goes on with a run under changes that were asked for.

    Args:
        before: as the run was started last.
        config: as it is to be started.
        where: its folder.
        may_change: changes of `CHANGEABLE` are asked for.

    Raises:
        UserError: it is another run's, or one changed without being asked for.
    """
    found = differences(essence(before), essence(config))
    fixed = [one for one in found if one not in changes(changeable(before), config)]
    if fixed:
        raise UserError(f"{where}: holds a run of another configuration ({'; '.join(fixed[:4])}); take a new folder")
    if found and not may_change:
        raise UserError(
            f"{where}: holds a run of another configuration ({'; '.join(found[:4])}); take a new folder, "
            "or go on under this one with --changed-config"
        )
    return bool(found)
