"""Gradients over ranks: when they are exchanged, the mean of those that nobody exchanges, and their norm."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from train.collectives import average, world_size


@contextmanager
def exchanged(module: nn.Module, now: bool) -> Iterator[None]:
    """Let backward passes in the block exchange gradients between ranks, or only add them up for later.

    FSDP exchanges them each time, and adds up shards: to add up before would take whole gradients on every rank.
    """
    if isinstance(module, DistributedDataParallel) and not now:
        with module.no_sync():
            yield
    else:
        yield


def reorders_gradients(module: nn.Module) -> bool:
    """Tell whether the next exchange's messages hold gradients in another order than those of all later ones.

    DDP orders them anew once it has seen in which order they come. The order in which three ranks or more are summed
    depends on the place in a message, and so would a resumed run's first step on its being the first.
    """
    return isinstance(module, DistributedDataParallel) and world_size() > 2 and not module._has_rebuilt_buckets


def average_gradients(module: nn.Module, objective: object) -> None:
    """Average the gradients that neither DDP nor FSDP takes care of: of whole parameters, and of the objective's."""
    whole: list[nn.Parameter] = []
    if isinstance(module, FSDPModule):
        whole += [parameter for parameter in module.parameters() if not isinstance(parameter, DTensor)]
    if isinstance(objective, nn.Module):
        whole += objective.parameters()
    average(parameter.grad for parameter in whole if parameter.grad is not None)


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients down to a norm of `max_norm`, and return the norm before: the same on every rank.

    Args:
        parameters: parameters of the model and of the objective, whole or sharded.
        max_norm: largest norm over all of them together; 0: none, the norm is only measured.
    """
    kinds = _kinds(parameters)
    # Shards of one model share their mesh, so their norm is one message.
    norms = [_norm(kind) for kind in kinds] or [torch.zeros(())]
    total = norms[0]
    if len(norms) > 1:
        total = torch.linalg.vector_norm(torch.stack([norm.to(total.device) for norm in norms]))
    if max_norm:
        factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
        for kind in kinds:
            torch._foreach_mul_(_local(kind), factor.to(kind[0].device))
    return total


def zero_gradients(parameters: Iterable[Tensor]) -> None:
    """Set all gradients to zero, in the memory that they have."""
    for kind in _kinds(parameters):
        torch._foreach_zero_(_local(kind))


def _kinds(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Return the gradients that are whole and those that are sharded: one operation takes either kind only."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    kinds: list[list[Tensor]] = [[], []]
    for gradient in gradients:
        kinds[isinstance(gradient, DTensor)].append(gradient)
    return [kind for kind in kinds if kind]


def _local(gradients: list[Tensor]) -> list[Tensor]:
    return [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]


def _norm(gradients: list[Tensor]) -> Tensor:
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
