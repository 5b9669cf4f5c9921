"""Running statistics of normalisation layers: one update a step, over the ranks and over micro batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from infra.errors import UserError
from train.collectives import average


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """Return the layers that normalise by statistics of the batch."""
    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]


def average_buffers(model: nn.Module) -> None:
    """Set every floating-point buffer (running statistics) to its mean over the ranks.

    Their update is linear in what a rank has seen, so the mean is what one process on the whole batch has.
    """
    average(buffer for buffer in model.buffers() if buffer.is_floating_point())


@contextmanager
def put_aside(module: nn.Module) -> Iterator[list[Tensor]]:
    """Let the block update copies of the running statistics, yielded here; afterwards they are as before.

    The copies take the place of the buffers, which are not written to: a graph that read them stays valid.
    """
    layers = batch_norms(module)
    kept = [dict(layer._buffers) for layer in layers]
    for layer in layers:
        layer._buffers.update({name: buffer.clone() for name, buffer in layer._buffers.items() if buffer is not None})
    try:
        yield buffers_of(layers)
    finally:
        for layer, buffers in zip(layers, kept, strict=True):
            layer._buffers.update(buffers)


def buffers_of(layers: Sequence[nn.Module]) -> list[Tensor]:
    """Return the layers' own buffers in a fixed order."""
    return [buffer for layer in layers for buffer in layer._buffers.values() if buffer is not None]


class MeanUpdate:
    """The update of one step, put together from those of its micro batches.

    Each micro batch starts from the statistics before the step, see `put_aside`; their mean, weighted by
    samples, is the update of the whole.
    """

    def __init__(self, model: nn.Module) -> None:
        self.buffers = buffers_of(batch_norms(model))
        self.sums = [torch.zeros_like(buffer) for buffer in self.buffers]

    def add(self, updated: Sequence[Tensor], share: float) -> None:
        """Take in a micro batch's statistics, which makes `share` of the samples."""
        for total, value in zip(self.sums, updated, strict=True):
            if value.is_floating_point():
                total.add_(value, alpha=share)
            else:  # a count of steps
                total.copy_(value)

    def apply(self) -> None:
        """Write the mean to the model."""
        for buffer, total in zip(self.buffers, self.sums, strict=True):
            buffer.copy_(total)


def check_groups(model: nn.Module, micro_batch: int, batch: int) -> None:
    """Check that micro batches hold whole groups of batch statistics.

    Args:
        model: the model.
        micro_batch: samples a rank takes at once; 0: all.
        batch: samples of a step on each rank.

    Raises:
        UserError: a group would be cut, which changes features and gradients.
    """
    if not micro_batch or micro_batch >= batch:
        return
    for layer in batch_norms(model):
        group = int(getattr(layer, "group", 0)) or batch
        if micro_batch % group:
            raise UserError(
                f"parallel.micro_batch: {micro_batch} samples are not whole groups of {group}, over which the image "
                f"tower takes its statistics; take a multiple of {group}, or set the model's statistics_group to a "
                f"divisor of {micro_batch}"
            )


def smallest_grid(tower: nn.Module, side: int) -> int:
    """Return the fewest values of one picture that a channel's batch statistics are taken over; 0 without any.

    Args:
        tower: an image tower on the meta device, where nothing is computed.
        side: of the pictures, pixels.
    """
    grids: list[int] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        grids.append(inputs[0].shape[2:].numel())

    hooks = [layer.register_forward_pre_hook(note) for layer in batch_norms(tower)]
    with torch.no_grad():
        tower.eval()(torch.empty(1, 3, side, side, device="meta"))
    for hook in hooks:
        hook.remove()
    return min(grids, default=0)
