"""The sum of a sigmoid loss over all pairs, tile by tile, with its gradient computed on the way.

No pair depends on another, so a tile's gradient is known as soon as its logits are: three products of the matrix's
size, as many as with the matrix in memory, and nothing is computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from train.objectives.tiles import Buffer, FirstRanked, Tile, tiles

LINEAR_FROM = 40.0
"""Where softplus(x) is x: in float64 too, exp(-40) is below what x can hold."""


def tiled_sigmoid_loss(
    query: Tensor, keys: Tensor, bias: Tensor, numbers: Tensor | None, first: int, side: int
) -> tuple[Tensor, Tensor]:
    """Sum `-log(sigmoid(z * (query @ keys.T + bias)))` over this rank's rows; no more than three tiles are in memory.

    Args:
        query: this rank's rows `[B, D]`.
        keys: the keys of all ranks `[N, D]`.
        bias: a scalar.
        numbers: `[N]`; pairs of equal ones are positive (z = 1), all others negative (z = -1). None: each row
            has one positive, the key numbered `first` and its own number.
        first: number of the key that belongs to this rank's first row.
        side: rows and columns of a tile.

    Returns:
        The sum, differentiable once, and which rows have their own pair ranked first `[B]`.
    """
    return TiledSigmoidLoss.apply(query, keys, bias, numbers, first, side, torch.is_grad_enabled())


class TiledSigmoidLoss(torch.autograd.Function):
    """See `tiled_sigmoid_loss`."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        keys: Tensor,
        bias: Tensor,
        numbers: Tensor | None,
        first: int,
        side: int,
        is_trained: bool,
    ) -> tuple[Tensor, Tensor]:
        """Go once over the tiles."""
        side = min(side, len(query))
        buffer = Buffer(side, side, query)
        ranked, total = FirstRanked(len(query), query), torch.zeros_like(bias)
        wanted = [is_trained and needed for needed in ctx.needs_input_grad[:3]]
        to_query, to_keys, to_bias = (
            torch.zeros_like(tensor) if is_wanted else None
            for tensor, is_wanted in zip((query, keys, bias), wanted, strict=True)
        )
        for tile in tiles(len(query), len(keys), first, side):
            logits = buffer.product(query[tile.rows], keys[tile.columns]).add_(bias)
            ranked.see(logits, tile, logits.amax(1))
            _negate_positives(logits, numbers, tile, first)
            total += F.softplus(logits, threshold=LINEAR_FROM).sum()
            to_logits = logits.sigmoid_()
            _negate_positives(to_logits, numbers, tile, first)
            if to_query is not None:
                to_query[tile.rows].addmm_(to_logits, keys[tile.columns])
            if to_keys is not None:
                to_keys[tile.columns].addmm_(to_logits.T, query[tile.rows])
            if to_bias is not None:
                to_bias += to_logits.sum()
        ctx.save_for_backward(to_query, to_keys, to_bias)
        ctx.mark_non_differentiable(ranked.right)
        return total, ranked.right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_total: Tensor, right: Tensor) -> tuple[Tensor | None, ...]:
        """Pass on what the forward pass left."""
        passed_on = (None if gradient is None else gradient * to_total for gradient in ctx.saved_tensors)
        return (*passed_on, None, None, None, None)


def _negate_positives(tile_values: Tensor, numbers: Tensor | None, tile: Tile, first: int) -> None:
    """Turn the sign of the positive pairs' values, in place."""
    if numbers is not None:
        same = numbers[first:][tile.rows, None] == numbers[tile.columns]
        tile_values.mul_(1 - 2 * same.to(tile_values.dtype))
    elif tile.own:
        tile_values.diagonal().neg_()
