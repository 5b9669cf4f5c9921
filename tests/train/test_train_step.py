"""A step of the loop is the textbook's: schedule, clipping, AdamW, the temperature's bound, the moving average."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train.augment import DRAWS, augment
from train.config import RunConfig
from train.data import Batch
from train.launch import prepare
from train.loop import train_step
from train.model import DualEncoder
from train.state import build

BATCH, STEPS, TOTAL_STEPS, WARMUP_STEPS = 16, 3, 12, 2
RATE, DECAY, BETAS, EPSILON = 0.01, 0.2, (0.8, 0.95), 1e-3
CLIP_NORM, EMA = 0.1, 0.2
"""A norm that bites; and a decay that counts from the second step on, the first keeping less."""


def rate_of(step: int) -> float:
    """The learning rate in the middle of a step, counted from 0: linear, then half a cosine."""
    middle = step + 0.5
    if middle < WARMUP_STEPS:
        return RATE * middle / WARMUP_STEPS
    return RATE * (1 + math.cos(math.pi * (middle - WARMUP_STEPS) / (TOTAL_STEPS - WARMUP_STEPS))) / 2


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Matrices and filters, and no embeddings."""
    return parameter.ndim > 1 and name not in ("token_embedding.weight", "positional_embedding")


def reference(model: DualEncoder, config: RunConfig, batches: list[Batch]) -> tuple[dict[str, Tensor], list[float]]:
    """Train a model in torch's own terms; return its weights' moving average, and the norms before clipping."""
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if is_decayed(n, p) == decayed], "weight_decay": DECAY * decayed}
        for decayed in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=EPSILON)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    norms = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate_of(step)
        images = augment(batch.images, batch.numbers[:, :DRAWS], config.augment)
        features = model(images, batch.tokens)
        logits, own = features.logit_scale * features.image @ features.text.T, torch.arange(BATCH)
        optimizer.zero_grad()
        ((F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)))
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        kept = min(EMA, (2 + step) / (11 + step))
        for name, value in model.state_dict().items():
            average[name] = kept * average[name] + (1 - kept) * value if value.is_floating_point() else value.clone()
    return average, norms


def test_three_steps_are_those_of_a_reference(tmp_path: Path, make_config: Callable[..., RunConfig]) -> None:
    """Weights, running statistics and averages; the temperature begins out of its bound."""
    optim = {
        "learning_rate": RATE, "weight_decay": DECAY, "beta1": BETAS[0], "beta2": BETAS[1], "epsilon": EPSILON,
        "warmup": f"{WARMUP_STEPS} steps", "clip_norm": CLIP_NORM, "ema": EMA,
    }  # fmt: skip
    config = make_config(length=f"{TOTAL_STEPS} steps", optim=optim)
    prepare(config, tmp_path, 1)
    state = build(config, tmp_path)
    assert state.average is not None
    with torch.no_grad():
        for scale in (state.model.logit_scale, state.average.average["logit_scale"]):
            scale.fill_(math.log(110))
    model = copy.deepcopy(state.model)
    reader = iter(state.data)
    batches = [next(reader) for _ in range(STEPS)]
    reader.close()  # type: ignore[attr-defined]
    average, norms = reference(model, config, batches)
    assert min(norms) > 2 * CLIP_NORM

    found = [train_step(state, batch)["gradient_norm"] for batch in batches]
    torch.testing.assert_close(found, norms, rtol=1e-3, atol=0)
    for ours, theirs in ((state.model.state_dict(), model.state_dict()), (state.average.average, average)):
        assert ours.keys() == theirs.keys()
        wrong = {name for name, value in theirs.items() if not torch.allclose(ours[name], value, rtol=0, atol=1e-5)}
        assert wrong == set()
