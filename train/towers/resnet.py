"""A small residual image tower for one CPU, with batch statistics that do not depend on the world size.

Residual blocks after He et al. 2015, "Deep Residual Learning" (section 3.3), with the average-pooled shortcut
of He et al. 2018, "Bag of Tricks" (ResNet-D, section 4.2). Parameters are named as in OpenAI's `visual.*`
(`conv1`, `bn1`, `layer1.0.conv1`, ...).
"""

from __future__ import annotations

from collections.abc import Sequence

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


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; the first convolution and average pooling take the stride."""

    def __init__(self, inputs: int, outputs: int, stride: int, group: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = GroupedBatchNorm(outputs, group)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = GroupedBatchNorm(outputs, group)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            pool = nn.AvgPool2d(stride, ceil_mode=True) if stride > 1 else nn.Identity()
            convolution = nn.Conv2d(inputs, outputs, 1, bias=False)
            self.downsample = nn.Sequential(pool, convolution, GroupedBatchNorm(outputs, group))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, inputs, H, W]` to `[B, outputs, H / stride, W / stride]`."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y = y + (x if self.downsample is None else self.downsample(x))
        return F.relu(y, inplace=True)


class ResidualTower(nn.Module):
    """A 3x3 stem, one stage a width (each but the first halves the resolution), pooling to a grid, a projection.

    Args:
        widths: channels of each stage.
        depths: residual blocks of each stage.
        embed_dim: D of the features.
        stem_stride: stride of the stem.
        pool_grid: cells a side that the last stage is averaged to. With 1 a feature says what there is in a
            picture; with more, where it is as well, which centred pictures of one object gain from.
        group: samples whose statistics are taken together, see `GroupedBatchNorm`.
    """

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        embed_dim: int,
        *,
        stem_stride: int = 2,
        pool_grid: int = 1,
        group: int = 0,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, stem_stride, padding=1, bias=False)
        self.bn1 = GroupedBatchNorm(widths[0], group)
        inputs = widths[0]
        self.stages = len(widths)
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True), start=1):
            blocks = []
            for block in range(depth):
                stride = 2 if stage > 1 and block == 0 else 1
                blocks.append(BasicBlock(inputs, width, stride, group))
                inputs = width
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        # Pooled features are all positive and point the same way; centred, they tell pictures apart from step one.
        self.bn_pool = GroupedBatchNorm(inputs, group)
        self.pool = nn.AdaptiveAvgPool2d(pool_grid)
        self.proj = nn.Parameter(torch.empty(inputs * pool_grid**2, embed_dim))
        self.initialise()

    def initialise(self) -> None:
        """Draw convolutions after He et al. 2015, "Delving Deep into Rectifiers" (section 2.2).

        Residual scales start at 1: at 0 (Goyal et al. 2017, 5.1) so shallow a tower learns later, and a short
        run ends lower (`docs/benchmarks.md`).
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.proj, std=self.proj.shape[0] ** -0.5)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images `[B, 3, H, W]` to features `[B, D]`, not yet of unit length."""
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        for stage in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.bn_pool(self.pool(x)).flatten(1) @ self.proj
