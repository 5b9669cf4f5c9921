"""The optimiser and its schedule, a function of samples seen: a change of batch size does not bend it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from infra.config import Config, knob
from train.length import Length
from train.parallel import is_kept_whole


class OptimConfig(Config):
    """AdamW (Loshchilov and Hutter 2019) and its learning rate over the run."""

    learning_rate: float = Field(default=1e-3, gt=0, description="peak learning rate")
    weight_decay: float = Field(
        default=0.1, ge=0, description="decoupled decay of matrices and filters; none on the rest"
    )
    decay_embeddings: bool = Field(
        default=False, description="decay the tables of token and positional embeddings too, as CLIP and open_clip do"
    )
    beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(default=0.98, ge=0, lt=1, description="decay of the second moment")
    epsilon: float = Field(default=1e-6, gt=0, description="added to the root of the second moment")
    schedule: Literal["cosine", "constant", "wsd"] = Field(
        default="cosine", description="shape after the warm-up; wsd: constant, then down to 0 over `decay`"
    )
    warmup: Length = Field(default="2%", description="length of the linear warm-up")
    decay: Length = Field(default="10%", description="length of the way down to 0 at the end of `wsd`")
    clip_norm: float = knob(1.0, "largest gradient norm; 0: no clipping", ge=0)
    on_bad_step: Literal["stop", "skip"] = knob(
        "stop", "what a bad step does: end the run, or be dropped on all ranks and counted"
    )
    spike: float = knob(0.0, "a loss above so many times its running mean is bad too, as a NaN is; 0: none is", ge=0)
    max_bad_steps: int = knob(10, "steps dropped in a row that end the run", ge=1)
    ema: float = Field(default=0.0, ge=0, lt=1, description="decay a step of the averaged weights; 0: none are kept")


def decays(name: str, parameter: nn.Parameter, embeddings: bool = False) -> bool:
    """Tell whether a parameter is decayed: matrices and filters are, gains and biases are not.

    Tables of embeddings are if `embeddings` says so: Radford et al. 2021, section 2.5, decays "all weights that are not
    gains or biases". A class token, a vector, never is, as in open_clip.
    """
    return parameter.ndim >= 2 and (embeddings or "embedding" not in name)


def create_optimizer(model: nn.Module, config: OptimConfig, *heads: nn.Module) -> torch.optim.AdamW:
    """Build AdamW with one group that decays and two that do not: what is never sharded has its own.

    `heads` are objectives with weights of their own, which are never sharded; they have two groups more.
    """
    decayed, still = _halves(model, config)
    groups = [
        {"params": list(decayed.values()), "weight_decay": config.weight_decay},
        {"params": [p for name, p in still.items() if not is_kept_whole(model, name)], "weight_decay": 0.0},
        {"params": [p for name, p in still.items() if is_kept_whole(model, name)], "weight_decay": 0.0},
    ]
    for head in heads:
        own, rest = _halves(head, config)
        groups += [
            {"params": list(own.values()), "weight_decay": config.weight_decay},
            {"params": list(rest.values()), "weight_decay": 0.0},
        ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.epsilon, fused=True)


def _halves(module: nn.Module, config: OptimConfig) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Return by name what is trained and decayed, and what is trained alone."""
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    decayed = {name: value for name, value in named if decays(name, value, config.decay_embeddings)}
    return decayed, {name: value for name, value in named if name not in decayed}


def learning_rate(config: OptimConfig, seen: int, warmup: int, total: int, decay: int = 0) -> float:
    """Return the learning rate once `seen` of `total` samples have been seen.

    Linear over the first `warmup` samples. Then constant; or half a cosine to 0 (Loshchilov and Hutter 2017); or
    constant until the last `decay` samples, and 1 - sqrt to 0 over them (Hagele et al. 2024, section 3).
    """
    if seen < warmup:
        return config.learning_rate * seen / warmup
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "wsd":
        done = min(1.0, max(0.0, 1 - (total - seen) / max(1, decay)))
        return config.learning_rate * (1 - math.sqrt(done))
    done = min(1.0, (seen - warmup) / max(1, total - warmup))
    return config.learning_rate * (1 + math.cos(math.pi * done)) / 2


class WeightAverage:
    """An exponential moving average of weights and running statistics (Polyak averaging).

    Args:
        model: the module followed.
        decay: share of the old average kept at each step; early steps keep less, so that the start is
            forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.average = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after one more step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        # Shards are averaged where they lie; operators over lists do not mix them with whole tensors.
        average = {name: _local(value) for name, value in self.average.items()}
        current = {name: _local(value) for name, value in model.state_dict().items()}
        floating = [name for name, value in current.items() if value.is_floating_point()]
        torch._foreach_lerp_([average[name] for name in floating], [current[name] for name in floating], 1 - decay)
        for name in current.keys() - set(floating):
            average[name].copy_(current[name])

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Put the averages into the model while the block runs."""
        current = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self.average)
        try:
            yield
        finally:
            model.load_state_dict(current)


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value
