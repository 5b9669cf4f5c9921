"""Image-to-text and text-to-image retrieval: recall at k."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CUTS = (1, 5, 10)


def distinct(captions: Sequence[str]) -> tuple[list[str], Tensor]:
    """Return the distinct captions in order of first sight, and the number of each picture's own `[N]`."""
    number = {text: index for index, text in enumerate(dict.fromkeys(captions))}
    return list(number), torch.tensor([number[text] for text in captions])


def recall(scores: Tensor, belongs: Tensor, cuts: Sequence[int] = CUTS) -> dict[str, float]:
    """Return the share of rows with one of their own among the `k` highest scores, for each cut `k`.

    Args:
        scores: `[N, M]`, higher is nearer.
        belongs: `[N, M]`, true where column belongs to row; rows with none do not count.
        cuts: values of `k`.
    """
    has_own = belongs.any(dim=1)
    order = scores.topk(min(max(cuts), scores.shape[1]), dim=1).indices
    hits = belongs.gather(1, order)[has_own]
    return {f"recall@{cut}": float(hits[:, :cut].any(dim=1).double().mean()) for cut in cuts}


def retrieval(image_features: Tensor, text_features: Tensor, own_text: Tensor) -> dict[str, dict[str, float]]:
    """Return recalls both ways.

    Args:
        image_features: unit features `[N, D]`.
        text_features: unit features of the distinct captions `[M, D]`.
        own_text: for each picture the number of its caption `[N]`.
    """
    scores = image_features @ text_features.T
    belongs = torch.nn.functional.one_hot(own_text, len(text_features)).bool()
    return {"image_to_text": recall(scores, belongs), "text_to_image": recall(scores.T, belongs.T)}
