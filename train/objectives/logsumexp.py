"""Log-sum-exp of every row and column of the logits, tile by tile, forward and backward.

A running log-sum-exp needs one tile at a time; its gradient, a softmax, is computed again from the features. The idea
is that of Rabe and Staats 2021, "Self-attention Does Not Need O(n²) Memory", applied to both directions of one matrix:
four products of its size, where the matrix kept in memory takes three. The sums themselves are in float64: a softmax is
the exp of a small difference of large numbers, and what is left of a well-learned pair's gradient one minus that.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from train.objectives.gather import every_rank, reduce_logsumexp
from train.objectives.tiles import Buffer, FirstRanked, full_precision, tiles


def tiled_logsumexp(query: Tensor, keys: Tensor, first: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-sum-exps of the logits `query @ keys.T`, of which no more than two tiles are in memory.

    Across ranks the columns are summed over all of them, so each rank computes its rows alone, and no logit is
    computed twice.

    Args:
        query: this rank's rows `[B, D]`.
        keys: the keys of all ranks `[N, D]`.
        first: number of the key that belongs to this rank's first row.
        side: rows and columns of a tile.

    Returns:
        That of each row `[B]`, that of the columns of this rank's keys `[B]`, both float64 and differentiable
        once, and which rows have their own pair ranked first `[B]`.
    """
    return TiledLogSumExp.apply(query, keys, first, side)


class TiledLogSumExp(torch.autograd.Function):
    """See `tiled_logsumexp`."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, keys: Tensor, first: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
        """Go once over the tiles."""
        side = min(side, len(query))
        buffer, spare = Buffer(side, side, query), Buffer(side, side, query)
        rows = query.new_full((len(query),), -torch.inf, dtype=torch.float64)
        columns = query.new_full((len(keys),), -torch.inf, dtype=torch.float64)
        ranked = FirstRanked(len(query), query)
        shifts = []
        for tile in tiles(len(query), len(keys), first, side):
            logits = buffer.product(query[tile.rows], keys[tile.columns])
            highest = logits.amax(1)
            ranked.see(logits, tile, highest)
            shifts.append(_shift(logits, highest))
            by_row, by_column = _logsumexps(logits, highest, shifts[-1], spare)
            rows[tile.rows] = torch.logaddexp(rows[tile.rows], by_row)
            columns[tile.columns] = torch.logaddexp(columns[tile.columns], by_column)
        columns = reduce_logsumexp(columns)
        ctx.save_for_backward(query, keys, rows, columns)
        ctx.first, ctx.side, ctx.shifts = first, side, shifts
        ctx.mark_non_differentiable(ranked.right)
        return rows, columns[first : first + len(query)].clone(), ranked.right

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, by_row: Tensor, by_column: Tensor, right: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Compute each tile's softmaxes again and add what they send back to the features."""
        query, keys, rows, columns = ctx.saved_tensors
        by_column = every_rank(by_column)
        buffer, spare = Buffer(ctx.side, ctx.side, query), Buffer(ctx.side, ctx.side, query)
        to_query = torch.zeros_like(query) if ctx.needs_input_grad[0] else None
        to_keys = torch.zeros_like(keys) if ctx.needs_input_grad[1] else None
        with full_precision(query.device):
            for tile, shift in zip(tiles(len(query), len(keys), ctx.first, ctx.side), ctx.shifts, strict=True):
                logits = buffer.product(query[tile.rows], keys[tile.columns])
                to_logits = _softmaxes(
                    logits,
                    (rows[tile.rows], by_row[tile.rows]),
                    (columns[tile.columns], by_column[tile.columns]),
                    shift,
                    spare,
                )
                if to_query is not None:
                    to_query[tile.rows].addmm_(to_logits, keys[tile.columns])
                if to_keys is not None:
                    to_keys[tile.columns].addmm_(to_logits.T, query[tile.rows])
        return to_query, to_keys, None, None


def _shift(logits: Tensor, highest: Tensor) -> float | None:
    """Return what to take off all logits of a tile so that one exp serves both directions, or None.

    It does where they span so little that the lowest one's exp, and the inverse of it, is still a normal number.
    """
    top, bottom = torch.stack([highest.max(), logits.min()]).tolist()
    return top if top - bottom < -0.9 * math.log(torch.finfo(logits.dtype).tiny) else None


def _logsumexps(logits: Tensor, highest: Tensor, shift: float | None, spare: Buffer) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp of each row and of each column; the logits are overwritten."""
    if shift is not None:
        exps = logits.sub_(shift).exp_()
        return exps.sum(1).double().log_().add_(shift), exps.sum(0).double().log_().add_(shift)
    exps = torch.sub(logits, highest[:, None], out=spare.like(logits)).exp_()
    by_row = exps.sum(1).double().log_().add_(highest)
    highest = logits.amax(0)
    return by_row, logits.sub_(highest).exp_().sum(0).double().log_().add_(highest)


def _softmaxes(
    logits: Tensor, by_row: tuple[Tensor, Tensor], by_column: tuple[Tensor, Tensor], shift: float | None, spare: Buffer
) -> Tensor:
    """Return the sum of both directions' softmaxes, each times its weights; the logits are overwritten.

    Args:
        logits: of one tile, `[rows, columns]`.
        by_row, by_column: log-sum-exp and weight of each row, and of each column.
        shift: what `_shift` said of the tile.
        spare: memory for another tile.
    """
    other, dtype = spare.like(logits), logits.dtype
    if shift is not None:
        row_factors, column_factors = (
            ((shift - sums).exp_() * weights).to(dtype) for sums, weights in (by_row, by_column)
        )
        torch.add(row_factors[:, None], column_factors, out=other)
        return logits.sub_(shift).exp_().mul_(other)
    # What a sum loses in the logits' type is made up for by the weight.
    (rows, row_weights), (columns, column_weights) = (
        (sums.to(dtype), ((sums.to(dtype) - sums).exp_() * weights).to(dtype)) for sums, weights in (by_row, by_column)
    )
    torch.sub(logits, rows[:, None], out=other).exp_().mul_(row_weights[:, None])
    return logits.sub_(columns).exp_().mul_(column_weights).add_(other)
