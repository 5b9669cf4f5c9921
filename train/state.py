"""Everything of a run that a checkpoint holds, and how it is built from a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from infra.storage import Folder
from train import checkpoint
from train.config import RunConfig
from train.data import PairReader
from train.length import in_samples
from train.model import DualEncoder, create_model
from train.objectives import Objective, create_objective
from train.optim import WeightAverage, create_optimizer
from train.parallel import gather_states, parallelize, rank, world_size
from train.precision import chosen
from train.tokenizer import load_tokenizer
from train.weights import load_published


@dataclass
class TrainingState:
    """A run in memory.

    Attributes:
        model: the dual encoder.
        parallel: what the loop calls: `model`, spread over the processes.
        average: the averaged weights, if any are kept.
        total: samples of the whole run.
        step, samples: how far the run is.
        seconds: training time so far, over all interruptions.
    """

    config: RunConfig
    model: DualEncoder
    parallel: nn.Module
    objective: Objective
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    data: PairReader
    total: int
    dtype: torch.dtype
    device: torch.device
    step: int = 0
    samples: int = 0
    seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values; every rank must call it, since each adds its random state."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "data": self.data.state_dict(),
            "random": gather_states(torch.get_rng_state()),
            "step": self.step,
            "samples": self.samples,
            "seconds": self.seconds,
        }
        if self.average is not None:
            state["average"] = self.average.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state. Raises UserError if it is another model's, corpus' or batch's."""
        checkpoint.load_weights(self.model, state["model"], "the newest checkpoint")
        self.optimizer.load_state_dict(state["optimizer"])
        self.data.load_state_dict(state["data"])
        self.step, self.samples, self.seconds = state["step"], state["samples"], state["seconds"]
        if self.average is not None and "average" in state:
            self.average.load_state_dict(state["average"])
        if len(state["random"]) == world_size():
            torch.set_rng_state(state["random"][rank()])
        else:
            torch.manual_seed(self.config.data.seed + 1000 * self.step + rank())

    def samples_of(self, length: str) -> int:
        """Return a length of the configuration in samples."""
        batch = self.config.data.global_batch_size
        return in_samples(length, batch=batch, epoch=self.data.epoch_samples, whole=self.total)

    def steps_of(self, length: str) -> int:
        """Return a length of the configuration in steps, one at least."""
        return max(1, self.samples_of(length) // self.config.data.global_batch_size)


def build(config: RunConfig, run: str | Path) -> TrainingState:
    """Build a run at its beginning, the same weights on every rank.

    Raises:
        UserError: the corpus, the batch or a name in the configuration does not work out.
    """
    device = torch.device("cpu")
    tokenizer = load_tokenizer(Folder(run))
    torch.manual_seed(config.data.seed)
    model = create_model(config.model, tokenizer.vocabulary).to(device)
    if config.model.weights:
        load_published(model, config.model.weights)
    if config.parallel.channels_last:
        model.visual.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    context = model.context_length
    data = PairReader(config.data, config.augment, tokenizer, context, rank=rank(), world_size=world_size())
    total = in_samples(config.length, batch=config.data.global_batch_size, epoch=data.epoch_samples)
    data.total = total
    return TrainingState(
        config=config,
        model=model,
        parallel=parallelize(model),
        objective=create_objective(**config.objective.model_dump()),
        optimizer=create_optimizer(model, config.optim),
        average=WeightAverage(model, config.optim.ema) if config.optim.ema else None,
        data=data,
        total=total,
        dtype=chosen(config.parallel.precision, device),
        device=device,
    )
