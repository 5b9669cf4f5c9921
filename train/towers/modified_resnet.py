"""The residual image tower of CLIP (RN50, RN101, RN50x4, RN50x16, RN50x64).

Radford et al. 2021, section 2.4: a stem of three convolutions, average pooling before every convolution that
would have a stride (ResNet-D, He et al. 2018, with the anti-aliasing of Zhang 2019), and attention pooling
instead of a mean. Parameters carry OpenAI's names.

BatchNorm ties the features to the samples it sees together: under data parallelism, to each rank's. With a
`group` that divides every rank's batch they do not depend on the world size, see `GroupedBatchNorm`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train.towers.batch_norm import GroupedBatchNorm
from train.towers.initial import draw_defaults

EXPANSION = 4
"""Channels that leave a block, for each inside it."""


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; average pooling takes the stride of both ways."""

    def __init__(self, inputs: int, planes: int, stride: int, group: int) -> None:
        super().__init__()
        outputs = planes * EXPANSION
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = GroupedBatchNorm(planes, group)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = GroupedBatchNorm(planes, group)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = GroupedBatchNorm(outputs, group)
        self.downsample: nn.Sequential | None = None
        if stride > 1 or inputs != outputs:
            shortcut: dict[str, nn.Module] = {
                "-1": nn.AvgPool2d(stride) if stride > 1 else nn.Identity(),
                "0": nn.Conv2d(inputs, outputs, 1, bias=False),
                "1": GroupedBatchNorm(outputs, group),
            }
            self.downsample = nn.Sequential(OrderedDict(shortcut))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, inputs, H, W]` to `[B, 4 * planes, H / stride, W / stride]`."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(self.avgpool(y)))
        y += x if self.downsample is None else self.downsample(x)
        return F.relu(y, inplace=True)


class AttentionPool2d(nn.Module):
    """The mean of all cells attends to all cells and itself; a projection follows.

    Args:
        grid: cells a side.
        width: C of the input.
        heads: attention heads.
        embed_dim: D of the output.
    """

    def __init__(self, grid: int, width: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.empty(grid**2 + 1, width))
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, embed_dim)

    def init_weights(self) -> None:
        """Draw weights as OpenAI's CLIP does."""
        draw_defaults(self)
        std = self.c_proj.in_features**-0.5
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            nn.init.normal_(layer.weight, std=std)
        nn.init.normal_(self.positional_embedding, std=std)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, grid, grid]` to `[B, D]`."""
        cells = x.flatten(2).transpose(1, 2)
        cells = torch.cat([cells.mean(1, keepdim=True), cells], dim=1) + self.positional_embedding.to(x.dtype)
        # The other queries of OpenAI's layer are thrown away by it, so they are not computed here.
        parts = self.q_proj(cells[:, :1]), self.k_proj(cells), self.v_proj(cells)
        split = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts]
        return self.c_proj(F.scaled_dot_product_attention(*split).flatten(1))


class ModifiedResNet(nn.Module):
    """Stem, four stages of bottleneck blocks, attention pooling.

    Args:
        layers: blocks of each of the four stages.
        width: channels of the stem; stage `n` (from 0) gives out `4 * width * 2**n`.
        heads: attention heads of the pooling.
        embed_dim: D of the features.
        image_size: side of the pictures, pixels; a multiple of 32.
        group: samples whose batch statistics are taken together; 0: the rank's whole batch.
    """

    def __init__(
        self, layers: Sequence[int], width: int, heads: int, embed_dim: int, image_size: int, *, group: int = 0
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.conv1 = nn.Conv2d(3, width // 2, 3, 2, padding=1, bias=False)
        self.bn1 = GroupedBatchNorm(width // 2, group)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = GroupedBatchNorm(width // 2, group)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = GroupedBatchNorm(width, group)
        self.avgpool = nn.AvgPool2d(2)
        inputs = width
        for stage, depth in enumerate(layers):
            planes, blocks = width * 2**stage, []
            for block in range(depth):
                blocks.append(Bottleneck(inputs, planes, 2 if stage and block == 0 else 1, group))
                inputs = planes * EXPANSION
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.stages = len(layers)
        self.attnpool = AttentionPool2d(image_size // 32, inputs, heads, embed_dim)

    def blocks(self) -> list[nn.Module]:
        """Return the residual blocks, first to last."""
        stages = [self.get_submodule(f"layer{stage}") for stage in range(1, self.stages + 1)]
        return [block for stage in stages for block in stage.children()]

    def init_weights(self) -> None:
        """Draw weights as OpenAI's CLIP does: every residual branch begins at zero."""
        draw_defaults(self)
        self.attnpool.init_weights()
        for block in self.blocks():
            assert isinstance(block, Bottleneck)
            nn.init.zeros_(block.bn3.weight)

    @property
    def state_width(self) -> int:
        """W of `states`."""
        return self.attnpool.k_proj.in_features

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images `[B, 3, S, S]` to features `[B, D]`, not yet of unit length."""
        return self.pooled(self.trunk(images))

    def trunk(self, images: Tensor) -> Tensor:
        """Map normalised images to the last stage's grid `[B, W, S / 32, S / 32]`."""
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        x = self.avgpool(F.relu(self.bn3(self.conv3(x)), inplace=True))
        for stage in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        return x

    def pooled(self, x: Tensor) -> Tensor:
        """Map what `trunk` gives to features `[B, D]`."""
        return self.attnpool(x)

    def states(self, x: Tensor) -> Tensor:
        """Map what `trunk` gives to the states `[B, P, W]` of its cells, row by row."""
        return x.flatten(2).transpose(1, 2)
