"""Batch normalisation whose statistics do not depend on the world size."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GroupedBatchNorm(nn.BatchNorm2d):
    """BatchNorm with training statistics over fixed groups of consecutive samples of the global batch.

    "Ghost" batch normalisation of Hoffer et al. 2017 ("Train longer, generalize better", section 4.1). As
    long as every rank holds whole groups, the features and gradients are those of one process on the whole
    batch, with no communication. Running statistics take the mean over the groups; since that update is
    linear, averaging the buffers over the ranks gives what one process would have.

    Args:
        channels: C of the input `[B, C, H, W]`.
        group: samples in a group; 0 takes the rank's whole batch, which ties the statistics to the world
            size.
    """

    def __init__(self, channels: int, group: int = 0) -> None:
        super().__init__(channels)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[B, C, H, W]`."""
        if not self.training or self.group in (0, len(x)):
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        outputs, means, variances = [], [], []
        for part in x.split(self.group):
            mean, variance = self.running_mean.clone(), self.running_var.clone()
            momentum = self.momentum or 0.0
            outputs.append(F.batch_norm(part, mean, variance, self.weight, self.bias, True, momentum, self.eps))
            means.append(mean)
            variances.append(variance)
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.copy_(torch.stack(means).mean(0))
        self.running_var.copy_(torch.stack(variances).mean(0))
        return torch.cat(outputs)
