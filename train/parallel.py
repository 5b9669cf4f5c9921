"""How a model is spread over processes, in one visible order, and the collectives the trainer needs."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def rank() -> int:
    """Return this process' number in the group, 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes in the group, 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def parallelize(model: nn.Module) -> nn.Module:
    """Return the module the loop calls: `model` itself, or `model` under data parallelism.

    Buffers are not broadcast: `average_buffers` keeps them equal, which for running statistics is exact and
    for rank 0's alone would not be.
    """
    if world_size() == 1:
        return model
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    broadcast = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {broadcast: False}
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **options)


def average_buffers(model: nn.Module) -> None:
    """Set every floating-point buffer (running statistics) to its mean over the ranks."""
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if world_size() == 1 or not buffers:
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    dist.all_reduce(flat)
    flat /= world_size()
    for buffer, mean in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))


def mean_over_ranks(values: Iterable[float]) -> list[float]:
    """Return the mean of each number over the ranks."""
    numbers = torch.tensor(list(values), dtype=torch.float64)
    if world_size() > 1:
        dist.all_reduce(numbers)
    return (numbers / world_size()).tolist()


def any_rank(flag: bool) -> bool:
    """Tell every rank whether the flag is set on one of them."""
    if world_size() == 1:
        return flag
    votes = torch.tensor([int(flag)])
    dist.all_reduce(votes)
    return bool(votes.item())


def gather_states(state: Tensor) -> list[Tensor]:
    """Return every rank's tensor (same shape and type on all), in rank order."""
    if world_size() == 1:
        return [state]
    states = [torch.empty_like(state) for _ in range(world_size())]
    dist.all_gather(states, state)
    return states
