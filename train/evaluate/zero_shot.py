"""Zero-shot classification with an ensemble of prompts (Radford et al. 2021, section 3.1.4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from train.evaluate.suite import PLACEHOLDER

EncodeTexts = Callable[[Sequence[str]], Tensor]


def classifier(encode: EncodeTexts, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Return one unit vector a class `[C, D]`: the mean of its prompts' unit features.

    Args:
        encode: maps N texts to unit features `[N, D]`.
        names: the classes.
        templates: prompts with `{c}`.
    """
    total = sum(encode([template.replace(PLACEHOLDER, name) for name in names]) for template in templates)
    return F.normalize(torch.as_tensor(total), dim=-1)


def accuracy(scores: Tensor, targets: Tensor, k: int) -> float:
    """Return the share of rows of `[N, C]` whose target `[N]` is among the `k` highest scores."""
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return float((best == targets[:, None]).any(dim=1).double().mean())
