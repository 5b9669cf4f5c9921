"""The matrix of logits cut into tiles, so that none but the one in hand is in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Literal, NamedTuple

import torch
from torch import Tensor

WHOLE_BYTES = 64 * 2**20
"""Logits of one rank up to which `auto` takes the whole matrix."""
SIDE_CPU, SIDE_ACCELERATOR = 2048, 4096
"""Sides of a tile under `auto`: 16 MiB stay in a processor's cache and are worth handing out to its threads."""

TileSide = int | Literal["auto"]


class Tile(NamedTuple):
    """Where a tile lies.

    Attributes:
        rows, columns: of the matrix of logits.
        own: the rows' own pairs are on this tile's diagonal.
        before: the tile's columns come before those of the rows' own pairs.
    """

    rows: slice
    columns: slice
    own: bool
    before: bool


def tiles(rows: int, columns: int, first: int, side: int) -> Iterator[Tile]:
    """Cut `[rows, columns]` into tiles, strip by strip, in each the tile with the rows' own pairs first.

    Args:
        rows: a rank's samples B.
        columns: those of all ranks, a multiple of `rows`.
        first: column of the first row's own pair, a multiple of `rows`.
        side: rows and columns of a tile; those at the end of a rank's part may be smaller.
    """
    for row in range(0, rows, side):
        strip, own = slice(row, min(row + side, rows)), first + row
        yield Tile(strip, slice(own, first + strip.stop), own=True, before=False)
        for part in range(0, columns, rows):
            for column in range(part, part + rows, side):
                if column != own:
                    yield Tile(strip, slice(column, min(column + side, part + rows)), False, column < own)


def tile_side(tile: TileSide, rows: int, columns: int, like: Tensor) -> int:
    """Return the side of a tile for a matrix of `like`'s type and device, 0 for the whole matrix at once."""
    if tile == "auto":
        if rows * columns * like.element_size() <= WHOLE_BYTES:
            return 0
        return SIDE_CPU if like.device.type == "cpu" else SIDE_ACCELERATOR
    return tile


class Buffer:
    """Memory for one tile, used again for the next.

    Args:
        rows, columns: of the largest tile.
        like: whose type and device it takes.
    """

    def __init__(self, rows: int, columns: int, like: Tensor) -> None:
        self._memory = like.new_empty(rows * columns)

    def like(self, tile: Tensor) -> Tensor:
        """Return the memory in the shape of a tile, whatever it holds."""
        return self._memory[: tile.numel()].view(tile.shape)

    def product(self, one: Tensor, other: Tensor) -> Tensor:
        """Return `one @ other.T`, `[rows, columns]`, overwriting what was there."""
        shape = len(one), len(other)
        return torch.mm(one, other.T, out=self._memory[: shape[0] * shape[1]].view(shape))


class FirstRanked:
    """Which rows have their own pair ranked first, the earlier of two equal logits counting as the higher.

    Attributes:
        right: `[B]`, true where no logit seen so far is ranked before the own pair's.
    """

    def __init__(self, rows: int, like: Tensor) -> None:
        self.right = torch.ones(rows, dtype=torch.bool, device=like.device)
        self._own = like.new_empty(rows)

    def see(self, logits: Tensor, tile: Tile, highest: Tensor) -> None:
        """Take in a tile's logits and the highest of each of its rows; those with the own pairs come first."""
        if tile.own:
            self._own[tile.rows] = logits.diagonal()
            self.right[tile.rows] = logits.argmax(1) == torch.arange(len(logits), device=logits.device)
        elif tile.before:
            self.right[tile.rows] &= highest < self._own[tile.rows]
        else:
            self.right[tile.rows] &= highest <= self._own[tile.rows]


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which logits are computed: as precisely as the features, under autocast too."""
    return torch.autocast(device.type, enabled=False)


def widened(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or as it is in float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
