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

from train.towers.batch_norm import GroupedBatchNorm
from train.towers.initial import draw_defaults


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

    def blocks(self) -> list[nn.Module]:
        """Return the residual blocks, first to last."""
        stages = [self.get_submodule(f"layer{stage}") for stage in range(1, self.stages + 1)]
        return [block for stage in stages for block in stage.children()]

    def init_weights(self) -> None:
        """Draw convolutions after He et al. 2015, "Delving Deep into Rectifiers" (section 2.2).

        Residual scales start at 1: at 0 (Goyal et al. 2017, 5.1) so shallow a tower learns later, and a short
        run ends lower (`docs/benchmarks.md`).
        """
        draw_defaults(self)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.proj, std=self.proj.shape[0] ** -0.5)

    @property
    def state_width(self) -> int:
        """W of `states`."""
        return self.bn_pool.num_features

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images `[B, 3, H, W]` to features `[B, D]`, not yet of unit length."""
        return self.pooled(self.trunk(images))

    def trunk(self, images: Tensor) -> Tensor:
        """Map normalised images to the last stage's grid `[B, W, rows, columns]`."""
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        for stage in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        return x

    def pooled(self, x: Tensor) -> Tensor:
        """Map what `trunk` gives to features `[B, D]`."""
        return self.bn_pool(self.pool(x)).flatten(1) @ self.proj

    def states(self, x: Tensor) -> Tensor:
        """Map what `trunk` gives to the states `[B, P, W]` of its cells, row by row."""
        return x.flatten(2).transpose(1, 2)
