"""Image-to-text and text-to-image retrieval: recall at k, as CLIP_benchmark and Radford et al. 2021 (table 13) count.

A picture has found its text with any of its captions among the k nearest; every caption asks for its picture. Unlike
there, a caption that several pictures have counts once, and each of them is right for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CUTS = (1, 5, 10)


def distinct(captions: Sequence[Sequence[str]]) -> tuple[list[str], Tensor]:
    """Return the distinct captions of all pictures in order of first sight, M of them, and whose each is.

    Args:
        captions: those of each of N pictures.

    Returns:
        The captions, and `[N, M]`, true where the caption is the picture's.
    """
    number = {text: index for index, text in enumerate(dict.fromkeys(text for own in captions for text in own))}
    belongs = torch.zeros(len(captions), len(number), dtype=torch.bool)
    pairs = [(picture, number[text]) for picture, own in enumerate(captions) for text in own]
    belongs[tuple(torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T)] = True
    return list(number), belongs


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


def retrieval(image_features: Tensor, text_features: Tensor, belongs: Tensor) -> dict[str, dict[str, float]]:
    """Return recalls both ways.

    Args:
        image_features: unit features `[N, D]`.
        text_features: unit features of the distinct captions `[M, D]`.
        belongs: `[N, M]`, true where the caption is the picture's.
    """
    scores = image_features @ text_features.T
    return {"image_to_text": recall(scores, belongs), "text_to_image": recall(scores.T, belongs.T)}
