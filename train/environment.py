"""What torchrun, or a launcher like it, tells a rank in its environment."""

from __future__ import annotations

import os
from typing import NamedTuple

from infra.errors import UserError

MEND = "start it with torchrun, or unset WORLD_SIZE"
LARGEST = 2**31 - 1


class Told(NamedTuple):
    """Which of how many ranks this process is."""

    rank: int
    world_size: int


def told() -> Told | None:
    """Return what the environment says, or None where no launcher has set `WORLD_SIZE`.

    Raises:
        UserError: a variable is missing beside `WORLD_SIZE`, or is no number in its range.
    """
    if "WORLD_SIZE" not in os.environ:
        return None
    world_size = _number("WORLD_SIZE", 1, LARGEST)
    found = Told(_number("RANK", 0, world_size - 1), world_size)
    if "LOCAL_WORLD_SIZE" in os.environ:
        _number("LOCAL_WORLD_SIZE", 1, world_size)
    if "LOCAL_RANK" in os.environ:
        _number("LOCAL_RANK", 0, LARGEST)
    if world_size > 1:
        _number("MASTER_PORT", 0, 65535)
        if not os.environ.get("MASTER_ADDR"):
            raise UserError(f"MASTER_ADDR: not set, where WORLD_SIZE is {world_size}; {MEND}")
    return found


def _number(name: str, least: int, most: int) -> int:
    text = os.environ.get(name)
    if text is None:
        raise UserError(f"{name}: not set, where WORLD_SIZE is {os.environ['WORLD_SIZE']}; {MEND}")
    if not (text.isascii() and text.isdigit() and len(text) < 11 and least <= int(text) <= most):
        raise UserError(f"{name}: {text!r} is no whole number from {least} to {most}; {MEND}")
    return int(text)
