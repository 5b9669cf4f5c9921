"""Everything of a run that a checkpoint holds, and how it is built from a configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infra.storage import Folder
from train import checkpoint
from train.bad_steps import StepGuard
from train.changes import changeable, changes
from train.checkpoint.weights import check_same
from train.config import RunConfig
from train.data import PairReader
from train.length import in_samples
from train.model import DualEncoder, create_model
from train.objectives import Objective, OwnWeights, check_needs, create_objective
from train.optim import WeightAverage, create_optimizer
from train.parallel import any_rank, chosen_device, gather_states, parallelize, rank, world_size
from train.precision import chosen
from train.statistics import check_groups
from train.tokenizer import load_tokenizer
from train.weights import load_published

WRAPPERS = ("_checkpoint_wrapped_module", "_orig_mod")
"""Parts of parameter names that come from how a model is run."""


@dataclass
class TrainingState:
    """A run in memory.

    Attributes:
        model: the dual encoder.
        parallel: what the loop calls: `model`, spread over the processes.
        average: the averaged weights, if any are kept.
        total: samples of the whole run.
        guard: judges each step before it is taken.
        step, samples: how far the run is.
        seconds: training time so far, over all interruptions.
        metrics: the newest log line.
        changed: what of the configuration is not as it was when the checkpoint was taken that this goes on from.
        torn: steps of the checkpoints that were passed over for it.
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
    guard: StepGuard
    step: int = 0
    samples: int = 0
    seconds: float = 0.0
    metrics: dict[str, Any] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    torn: set[int] = field(default_factory=set)
    _random: dict[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Return what is trained, and what goes with it, by its name in a checkpoint; no copies.

        `model.NAME`, `objective.NAME`, `average.NAME`, `optimizer.NAME.ENTRY`, `NAME` being a parameter's or buffer's
        however the model is spread or wrapped. Under FSDP they are shards (DTensor).
        """
        found = {f"model.{plain(name)}": value for name, value in self.model.state_dict().items()}
        if isinstance(self.objective, nn.Module):
            found |= {f"objective.{plain(name)}": value for name, value in self.objective.state_dict().items()}
        if self.average is not None:
            found |= {f"average.{plain(name)}": value for name, value in self.average.average.items()}
        for name, parameter in self._trained():
            entries = self.optimizer.state.get(parameter, {})
            found |= {f"optimizer.{name}.{entry}": value for entry, value in entries.items()}
        return found

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors by name and plain values; every rank must call it, since each adds its random state.

        Parameters, moments and averages are no copies, and change at the next `optimizer.step`; all else is copied.
        """
        tensors = self.tensors()
        for name, buffer in self.model.named_buffers():
            if f"model.{plain(name)}" in tensors:
                tensors[f"model.{plain(name)}"] = buffer.detach().clone()
        tensors["random"] = torch.stack(gather_states(torch.get_rng_state()))
        if self.device.type == "cuda":
            tensors["random_cuda"] = torch.stack(gather_states(torch.cuda.get_rng_state(self.device)))
        values = {
            "step": self.step,
            "samples": self.samples,
            "seconds": self.seconds,
            "data": self.data.state_dict(),
            "average_steps": self.average.steps if self.average is not None else 0,
            "metrics": self.metrics,
            "guard": self.guard.state_dict(),
            "optim": changeable(self.config),
        }
        return tensors, values

    def targets(self, meta: checkpoint.Meta, source: str) -> dict[str, Tensor]:
        """Return the tensors to read a checkpoint into.

        Raises:
            UserError: it is another model's.
            TornCheckpointError: averaged weights are wanted, and it has none.
        """
        here = {plain(name): list(value.shape) for name, value in self.model.state_dict().items()}
        if isinstance(self.objective, nn.Module):
            own = self.objective.state_dict()
            here |= {f"objective.{plain(name)}": list(value.shape) for name, value in own.items()}
        there = {f"objective.{name}": shape for name, shape in meta.shapes("objective").items()}
        check_same(here, meta.shapes("model") | there, source)
        if self.average is not None and not meta.shapes("average"):
            raise checkpoint.TornCheckpointError(f"{source}: average is missing, and optim.ema asks for it")
        parameters = dict(self._trained())
        for name, shape in meta.shapes("optimizer").items():
            owner, _, entry = name.rpartition(".")
            if owner in parameters and entry not in self.optimizer.state[parameters[owner]]:
                like = parameters[owner].detach()
                is_whole = list(like.shape) == shape
                blank = torch.zeros_like(like) if is_whole else torch.zeros(shape, device=like.device)
                self.optimizer.state[parameters[owner]][entry] = blank
        found = self.tensors()
        for name in ("random", "random_cuda"):
            sizes = meta.tensors[name].shape if name in meta.tensors else (0,)
            self._random[name] = torch.empty(sizes, dtype=torch.uint8)
            found[name] = self._random[name]
        return {name: value for name, value in found.items() if name in meta.tensors}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Go on from a checkpoint whose tensors are in `targets`. Raises UserError for another corpus or batch."""
        self.data.load_state_dict(values["data"])
        self.step, self.samples, self.seconds = values["step"], values["samples"], values["seconds"]
        self.metrics = values["metrics"]
        self.guard.load_state_dict(values["guard"])
        self.changed = changes(values.get("optim", {}) or changeable(self.config), self.config)
        if self.average is not None:
            self.average.steps = values["average_steps"]
        if len(self._random["random"]) != world_size():
            torch.manual_seed(self.config.data.seed + 1000 * self.step + rank())
            return
        torch.set_rng_state(self._random["random"][rank()].clone())  # a view into others' crashes it
        if self.device.type == "cuda" and len(self._random["random_cuda"]) == world_size():
            torch.cuda.set_rng_state(self._random["random_cuda"][rank()].clone(), self.device)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        named = [(plain(name), value) for name, value in self.model.named_parameters()]
        if isinstance(self.objective, nn.Module):
            # Both may have a `token_embedding`.
            named += [(f"objective.{plain(name)}", value) for name, value in self.objective.named_parameters()]
        return named

    def parameters(self) -> list[nn.Parameter]:
        """Return all that is trained: the model's parameters, and the objective's if it has any."""
        own = self.objective.parameters() if isinstance(self.objective, nn.Module) else ()
        return [*self.model.parameters(), *own]

    def samples_of(self, length: str) -> int:
        """Return a length of the configuration in samples."""
        batch = self.config.data.global_batch_size
        return in_samples(length, batch=batch, epoch=self.data.epoch_samples, whole=self.total)

    def steps_of(self, length: str) -> int:
        """Return a length of the configuration in steps, one at least."""
        return max(1, self.samples_of(length) // self.config.data.global_batch_size)


def build(config: RunConfig, run: str | Path) -> TrainingState:
    """Build a run at its beginning, the same weights on every rank; `model.weights` where there is no checkpoint yet.

    Raises:
        UserError: the corpus, the batch or a name in the configuration does not work out.
    """
    device = chosen_device()
    tokenizer = load_tokenizer(Folder(run))
    torch.manual_seed(config.data.seed)
    model = create_model(config.model, tokenizer.vocabulary).to(device)
    # Rank 0's word counts: another machine may see a shared folder's newest entries later.
    if config.model.weights and not any_rank(rank() == 0 and bool(checkpoint.saved(checkpoint.place(config, run)))):
        load_published(model, config.model.weights)
    if config.parallel.channels_last:
        model.visual.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    context = model.context_length
    data = PairReader(
        config.data, config.augment, tokenizer, context,
        rank=rank(), world_size=world_size(), patch_draws=model.patch_draws, device=device,
    )  # fmt: skip
    total = in_samples(config.length, batch=config.data.global_batch_size, epoch=data.epoch_samples)
    data.total = total
    dtype = chosen(config.parallel.precision, device)
    check_groups(model, config.parallel.micro_batch, config.data.global_batch_size // world_size())
    objective = create_objective(**config.objective.model_dump())
    check_needs(config.objective.name, objective, config.model)
    if isinstance(objective, OwnWeights):
        objective.build(model)
    heads = [objective.to(device)] if isinstance(objective, nn.Module) else []
    parallel = parallelize(model, config.parallel, device, dtype)
    torch.manual_seed(config.data.seed + rank())  # from here on each rank draws for other samples
    return TrainingState(
        config=config,
        model=model,
        parallel=parallel,
        objective=objective,
        optimizer=create_optimizer(model, config.optim, *heads),
        average=WeightAverage(model, config.optim.ema) if config.optim.ema else None,
        data=data,
        total=total,
        dtype=dtype,
        device=device,
        guard=StepGuard(config.optim, Path(run)),
    )


def plain(name: str) -> str:
    """Return a parameter's name without what wrappers (activation checkpointing, compilation) put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
