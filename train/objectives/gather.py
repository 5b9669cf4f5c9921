"""What objectives ask of the other ranks: their rows, with gradients or without, and their part of a sum.

Every rank holds the same number of rows. A rank's share of the loss is differentiated on that rank alone; data
parallelism then takes the mean over ranks, so the shares are made such that their mean is the loss of the whole batch.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from train.parallel import world_size

# One collective, renamed in torch 2.13.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def every_rank(rows: Tensor) -> Tensor:
    """Map this rank's `[B, ...]` to the `[world * B, ...]` of all ranks, in rank order, without gradients."""
    if world_size() == 1:
        return rows
    rows = rows.contiguous()
    gathered = rows.new_empty(world_size() * len(rows), *rows.shape[1:])
    dist.all_gather(list(gathered.chunk(world_size())), rows)
    return gathered


class GatherRows(torch.autograd.Function):
    """All ranks' rows, with gradients that flow back to the rank that made them.

    The backward pass sums over ranks, so the mean over ranks that data parallelism takes afterwards turns
    each rank's share of the loss into the gradient of their mean.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:
        """Map this rank's `[B, D]` to the `[world * B, D]` of all ranks, in rank order."""
        return every_rank(rows)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        """Sum every rank's gradient `[world * B, D]`, of which this rank gets its own rows' `[B, D]`."""
        whole = gradients[0].contiguous()
        own = whole.new_empty(len(whole) // world_size(), *whole.shape[1:])
        _reduce_scatter(own, whole)
        return own


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all ranks `[world * B, D]`, differentiable; a single process gets its own back."""
    return rows if world_size() == 1 else GatherRows.apply(rows)


def reduce_logsumexp(partial: Tensor) -> Tensor:
    """Return the logarithm `[N]` of the sum over ranks of `exp(partial)`, without gradients."""
    if world_size() == 1:
        return partial
    highest = partial.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    summed = (partial - highest).exp_()
    dist.all_reduce(summed)
    return summed.log_().add_(highest)


def mean_count(count: Tensor) -> Tensor:
    """Return the mean over ranks of a count, float64: a sum of this rank's over it is the rank's share of a mean."""
    total = count.double()
    if world_size() > 1:
        dist.all_reduce(total)
    return total / world_size()


def every_text(tokens: Tensor) -> Tensor:
    """Map this rank's token ids `[B, L]` to those of all ranks `[world * B, widest L]`, padded with 0 as they are."""
    if world_size() == 1:
        return tokens
    # A rank's batch is as wide as its longest text.
    widest = torch.tensor(tokens.shape[1], device=tokens.device)
    dist.all_reduce(widest, dist.ReduceOp.MAX)
    return every_rank(F.pad(tokens, (0, int(widest) - tokens.shape[1])))


def caption_numbers(tokens: Tensor) -> Tensor:
    """Number the different texts of the whole batch: token ids `[B, L]` of this rank to `[world * B]`.

    Equal texts get equal numbers, from 0 on, the same on every rank.
    """
    return torch.unique(every_text(tokens), dim=0, return_inverse=True)[1]
