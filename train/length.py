"""Lengths of a run, given in samples, steps, epochs or as a share of the whole."""

from __future__ import annotations

import math
import re
from typing import Annotated

from pydantic import AfterValidator

_LENGTH = re.compile(r"(\d+(?:\.\d+)?) ?(samples?|steps?|epochs?|%)")


def _checked(text: str) -> str:
    if not _LENGTH.fullmatch(text):
        raise ValueError("give a number and a unit: '150000 samples', '600 steps', '32 epochs' or '5%'")
    if not math.isfinite(float(text.rstrip("abcdefghijklmnopqrstuvwxyz% "))):
        raise ValueError("too large a number")
    return text


def _of_a_run(text: str) -> str:
    if text.endswith("%"):
        raise ValueError("a run's length is no share of it: give samples, steps or epochs")
    if not any(digit in text for digit in "123456789"):
        raise ValueError("a run has one step at least")
    return text


Length = Annotated[str, AfterValidator(_checked)]
RunLength = Annotated[Length, AfterValidator(_of_a_run)]
"""A length that `%` is a share of, and never nothing."""


def in_samples(length: str, *, batch: int, epoch: int, whole: int | None = None) -> int:
    """Return a length in samples.

    Args:
        length: such as `150000 samples`, `600 steps`, `32 epochs` or `5%`.
        batch: samples of a global batch.
        epoch: samples of an epoch.
        whole: samples that `%` is a share of.

    Raises:
        ValueError: not a length, or a share where there is no whole.
    """
    match = _LENGTH.fullmatch(length)
    if match is None:
        raise ValueError(f"{length!r} is not a length")
    number, unit = float(match[1]), match[2].rstrip("s")
    if unit == "%":
        if whole is None:
            raise ValueError(f"{length!r}: a share of what?")
        return round(number / 100 * whole)
    return round(number * {"sample": 1, "step": batch, "epoch": epoch}[unit])
