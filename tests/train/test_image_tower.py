"""What the residual tower's features tell and do not tell of a picture."""

from __future__ import annotations

import torch

from train.towers.resnet import ResidualTower


def moved_apart(pool_grid: int) -> float:
    """How far apart the features of a picture are whose left and right halves are exchanged."""
    torch.manual_seed(0)
    tower = ResidualTower((8,), (1,), 16, stem_stride=1, pool_grid=pool_grid).eval()
    tower.init_weights()
    picture = torch.zeros(1, 3, 32, 32)
    picture[..., 14:18, 6:10] = 1.0
    other = picture.roll(16, dims=3)
    with torch.no_grad():
        return float((tower(picture) - tower(other)).norm() / tower(picture).norm())


def test_a_mean_does_not_tell_where_things_are() -> None:
    assert moved_apart(pool_grid=1) < 1e-5


def test_a_grid_tells_where_things_are() -> None:
    assert moved_apart(pool_grid=2) > 0.1
