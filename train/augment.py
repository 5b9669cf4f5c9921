"""Random changes to pictures, as a pure function of (seed, epoch, sample key).

Every sample draws its numbers from a hash of its own key, so what happens to it depends neither on the world
size, nor on the number of loader threads, nor on what else is in the batch.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydantic import AfterValidator, Field
from torch import Tensor
from torch.nn import functional as F

from infra.config import Config

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's normalisation of RGB in [0, 1]."""

LUMA = (0.299, 0.587, 0.114)
DRAWS = 24
"""Uniform numbers a sample draws: 8 for the crop, the rest for `augment`."""
CROP_DRAWS = 8


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if not 0 < pair[0] <= pair[1]:
        raise ValueError("give two numbers above 0, the smaller one first")
    return pair


Range = Annotated[tuple[float, float], AfterValidator(_ordered)]


class AugmentConfig(Config):
    """How far training pictures are changed; 0 switches a change off."""

    crop_scale: Range = Field(
        default=(0.6, 1.0), description="area of the random crop, share of the picture with its margin"
    )
    crop_ratio: Range = Field(default=(0.85, 1.18), description="width by height of the random crop")
    flip: float = Field(default=0.0, ge=0, le=1, description="probability of a mirror image")
    rotation_degrees: float = Field(default=0.0, ge=0, description="largest turn either way, degrees")
    margin: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="white margin put around a picture before it is cropped, share of its side: "
        "crops then show it smaller as well as larger (pictures on a white ground)",
    )
    brightness: float = Field(default=0.0, ge=0, description="largest change of the brightness factor")
    contrast: float = Field(default=0.0, ge=0, description="largest change of the contrast factor")
    saturation: float = Field(default=0.0, ge=0, description="largest change of the saturation factor")
    hue_degrees: float = Field(default=0.0, ge=0, le=180, description="largest turn of the hue either way, degrees")
    grey: float = Field(default=0.0, ge=0, le=1, description="probability of a grey picture")
    keep_white: bool = Field(default=False, description="colour changes leave white white (pictures on a white ground)")
    blur: float = Field(default=0.0, ge=0, le=1, description="probability of a 3x3 binomial blur")
    erase: float = Field(default=0.0, ge=0, le=1, description="probability of a grey rectangle (Zhong et al. 2017)")


def draws(seed: int, epoch: int, keys: Sequence[str], count: int = DRAWS) -> NDArray[np.float32]:
    """Return uniform numbers in [0, 1), `[len(keys), count]`, each row a pure function of (seed, epoch, key).

    A 64-bit hash of the three is the state of a SplitMix64 generator (Steele et al. 2014, figure 17).
    """
    states = np.array([_hash(f"{seed}/{epoch}/{key}") for key in keys], dtype=np.uint64)
    with np.errstate(over="ignore"):
        z = states[:, None] + np.arange(1, count + 1, dtype=np.uint64)[None] * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(40)).astype(np.float32) / np.float32(2**24)


def framed(picture: Image.Image, margin: float) -> Image.Image:
    """Put a white margin around a picture, `margin` of its shorter side wide."""
    border = round(margin * min(picture.size))
    return ImageOps.expand(picture, border, "white") if border else picture


def crop_box(
    size: tuple[int, int], numbers: NDArray[np.float32], config: AugmentConfig
) -> tuple[float, float, float, float]:
    """Choose a crop of a picture of `size` (width, height, pixels): left, upper, right, lower.

    The random-resized crop of Szegedy et al. 2015, section 6, with the ratio drawn on a log scale; a box that
    would not fit is narrowed to the picture.
    """
    width, height = size
    low, high = config.crop_scale
    area = width * height * (low + (high - low) * float(numbers[0]))
    narrow, wide = (math.log(ratio) for ratio in config.crop_ratio)
    ratio = math.exp(narrow + (wide - narrow) * float(numbers[1]))
    across = min(float(width), math.sqrt(area * ratio))
    down = min(float(height), math.sqrt(area / ratio))
    left, upper = (width - across) * float(numbers[2]), (height - down) * float(numbers[3])
    return left, upper, left + across, upper + down


def normalise(images: Tensor) -> Tensor:
    """Map uint8 RGB `[B, 3, H, W]` to float32 with CLIP's mean and deviation."""
    mean, std = (_constant(value, images.device).view(1, 3, 1, 1) for value in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def augment(images: Tensor, numbers: Tensor, config: AugmentConfig) -> Tensor:
    """Turn uint8 crops `[B, 3, H, W]` and their draws `[B, DRAWS]` or more into changed, normalised float32."""
    u = numbers[:, CROP_DRAWS:]
    x = images.float() / 255
    x = _move(x, u, config)
    x = _recolour(x, u, config)
    if config.blur:
        x = torch.where(_chosen(u[:, 9], config.blur), _blurred(x), x)
    if config.erase:
        x = _erase(x, u[:, 10:15], config.erase)
    mean, std = (_constant(value, x.device).view(1, 3, 1, 1) for value in (MEAN, STD))
    return (x - mean) / std


def _move(x: Tensor, u: Tensor, config: AugmentConfig) -> Tensor:
    """Turn and mirror, in one resampling; what comes in from outside repeats the border."""
    if not (config.flip or config.rotation_degrees):
        return x
    angle = (2 * u[:, 0] - 1) * math.radians(config.rotation_degrees)
    mirror = torch.where(u[:, 2] < config.flip, -1.0, 1.0)
    cos, sin, still = angle.cos(), angle.sin(), torch.zeros_like(angle)
    theta = torch.stack([cos * mirror, -sin, still, sin * mirror, cos, still], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _recolour(x: Tensor, u: Tensor, config: AugmentConfig) -> Tensor:
    """Change brightness, contrast, saturation and hue: one 3x3 matrix and one offset a sample."""
    grey = _constant(LUMA, x.device).expand(3, 3)
    identity = torch.eye(3, device=x.device)
    chosen = u[:, 8] < config.grey
    saturation = torch.where(chosen, torch.zeros_like(u[:, 7]), 1 + (2 * u[:, 7] - 1) * config.saturation)
    matrix = grey + saturation.view(-1, 1, 1) * (identity - grey)
    if config.hue_degrees:
        matrix = matrix @ _hue_rotation((2 * u[:, 15] - 1) * math.radians(config.hue_degrees))
    brightness = 1 + (2 * u[:, 5] - 1) * config.brightness
    contrast = 1 + (2 * u[:, 6] - 1) * config.contrast
    matrix = matrix * (brightness * contrast).view(-1, 1, 1)
    middle = (0.5 * (1 - contrast)).view(-1, 1).expand(-1, 3)
    offset = 1 - matrix.sum(dim=2) if config.keep_white else middle
    flat = torch.baddbmm(offset.unsqueeze(2), matrix, x.flatten(2))
    return flat.view_as(x).clamp_(0, 1)


def _hue_rotation(angle: Tensor) -> Tensor:
    """Turn colours around the grey axis by `angle` `[B]` (Rodrigues' formula): `[B, 3, 3]`."""
    k = 3**-0.5
    cross = _constant((0.0, -k, k, k, 0.0, -k, -k, k, 0.0), angle.device).view(3, 3)
    identity = torch.eye(3, device=angle.device)
    cos, sin = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    return cos * identity + sin * cross + (1 - cos) / 3


def _blurred(x: Tensor) -> Tensor:
    line = _constant((0.25, 0.5, 0.25), x.device)
    kernel = (line[:, None] * line[None]).expand(3, 1, 3, 3)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)


def _erase(x: Tensor, u: Tensor, probability: float) -> Tensor:
    height, width = x.shape[2:]
    rows = torch.arange(height, device=x.device).view(1, 1, -1, 1) / height
    columns = torch.arange(width, device=x.device).view(1, 1, 1, -1) / width
    side_y, side_x = ((0.15 + 0.3 * u[:, k]).view(-1, 1, 1, 1) for k in (1, 2))
    top, left = u[:, 3].view(-1, 1, 1, 1) * (1 - side_y), u[:, 4].view(-1, 1, 1, 1) * (1 - side_x)
    inside = (rows >= top) & (rows < top + side_y) & (columns >= left) & (columns < left + side_x)
    return torch.where(inside & _chosen(u[:, 0], probability), torch.full_like(x, 0.5), x)


@functools.cache
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    # Made at each step they would each be a transfer that a card's queue has to run dry for.
    return torch.tensor(values, device=device)


def _chosen(u: Tensor, probability: float) -> Tensor:
    return (u < probability).view(-1, 1, 1, 1)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
