"""How much arithmetic a model's step is, and how much of it a device could do: model FLOP/s utilisation (MFU).

Chowdhery et al. 2022 (PaLM, appendix B): what forward and backward pass of the model need, by what the devices could
have done in the time. What activation checkpointing computes again does not count; nor does the loss.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from infra.logs import log
from train.config import RunConfig
from train.model import DualEncoder, create_model
from train.models import sizes_of
from train.objectives import Objective, create_objective, read_by_samples
from train.objectives.captioning import CaptioningObjective
from train.towers.decoder import TextDecoder


class Peak(NamedTuple):
    """Dense FLOP/s of a card, in bfloat16 (float16 where there is none) and float32."""

    bfloat16: float
    float32: float


PEAKS: dict[str, Peak] = {
    # From NVIDIA's data sheets, without sparsity; float32 outside of tensor cores. By the words of the driver's names.
    "B200": Peak(2250e12, 80e12),
    "GH200": Peak(989e12, 67e12),
    "H200": Peak(989e12, 67e12),
    "H200 NVL": Peak(836e12, 60e12),
    "H100": Peak(989e12, 67e12),  # SXM, whose name says HBM3 alone
    "H100 PCIe": Peak(756e12, 51e12),
    "H100 NVL": Peak(836e12, 60e12),
    "A100": Peak(312e12, 19.5e12),
    "A100 PCIe": Peak(312e12, 19.5e12),
    "A10G": Peak(70e12, 35e12),
    "A10": Peak(125e12, 31.2e12),
    "L40": Peak(181e12, 90.5e12),
    "L40S": Peak(362e12, 91.6e12),
    "L4": Peak(121e12, 30.3e12),
    "V100": Peak(125e12, 15.7e12),
    "V100 PCIe": Peak(112e12, 14e12),
    "T4": Peak(65e12, 8.1e12),
    "RTX 4090": Peak(165e12, 82.6e12),
    "RTX 3090": Peak(71e12, 35.6e12),
}
VARIANTS = {"nvl", "pcie", "ti", "d", "super", "laptop", "mig", "ada", "max", "q", "generation"}
"""Words that make another card, or a part of one, of what stands beside them."""


def peak_flops(device: torch.device, dtype: torch.dtype, given: float = 0.0) -> float:
    """Return what a device can do in FLOP/s: `given`, else from the table, else 0 (unknown, as any CPU's is)."""
    if given or device.type != "cuda":
        return given
    return card_peak(torch.cuda.get_device_name(device), dtype)


def card_peak(name: str, dtype: torch.dtype) -> float:
    """Return what the card that the driver calls `name` can do in FLOP/s; 0, and a warning, where nobody knows."""
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    for card, peak in PEAKS.items():
        own = set(card.lower().split())
        if own <= words and not (words - own) & VARIANTS:
            return peak.bfloat16 if dtype in (torch.bfloat16, torch.float16) else peak.float32
    log.warning("log.peak_flops: no peak of %s is known, so lines have no mfu; set it from the card's data sheet", name)
    return 0.0


class FlopsBySize:
    """`flops_a_sample` at any size of a batch, from three counts for each side of the pictures.

    In the length L of texts the cost is a + b L + c L^2: attention is quadratic, all else is linear, and where texts
    are put back to the whole context b and c are 0. So the first three lengths are counted, which takes seconds for a
    large model, and the others follow from them exactly.

    Args:
        config: the run.
        vocabulary: size of the tokenizer's.
    """

    def __init__(self, config: RunConfig, vocabulary: int) -> None:
        self.config, self.vocabulary = config, vocabulary
        self._counted: dict[int, dict[int, Fraction]] = {}

    def __call__(self, side: int, length: int) -> float:
        """Return the operations of one sample, its picture `side` pixels a side, its text `length` tokens."""
        counted = self._counted.setdefault(side, {})
        if length not in counted and len(counted) < 3:
            counted[length] = Fraction(flops_a_sample(self.config, self.vocabulary, side, length))
        if length in counted:
            return float(counted[length])
        value = Fraction(0)  # Lagrange's polynomial through the three
        for at, count in counted.items():
            others = [other for other in counted if other != at]
            value += count * math.prod(Fraction(length - other, at - other) for other in others)
        return float(value)


def flops_a_sample(config: RunConfig, vocabulary: int, side: int, length: int) -> float:
    """Return the floating-point operations of one sample, forward and backward, counted without computing.

    The towers', and those of the decoder of captions, every text taken to be as long as its batch is wide.

    Args:
        config: the run.
        vocabulary: size of the tokenizer's.
        side: of the pictures, pixels.
        length: of the texts, tokens.
    """
    pairs = 2 * max(1, _group(config))
    objective = create_objective(**config.objective.model_dump())
    counter: Any = FlopCounterMode(display=False)
    with torch.device("meta"):
        model = create_model(config.model, vocabulary)
        decoder = _decoder(objective, model)
        images, tokens = torch.empty(pairs, 3, side, side), torch.zeros(pairs, length, dtype=torch.int64)
        with counter:
            features = model(images, tokens, read_by_samples(objective))
            total = features.image.sum() + features.text.sum()
            if decoder is not None:
                total = total + decoder.logits(decoder(tokens[:, :-1], features.image_states)).sum()
            total.backward()
    return float(counter.get_total_flops()) / pairs


def _decoder(objective: Objective, model: DualEncoder) -> TextDecoder | None:
    if not isinstance(objective, CaptioningObjective):
        return None
    objective.build(model)
    return objective.decoder


def _group(config: RunConfig) -> int:
    sizes = sizes_of(config.model)
    return sizes.vision.statistics_group or sizes.statistics_group
