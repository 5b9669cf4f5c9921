"""A sample's picture as training takes it: decoded, cropped at random, brought to size; 8-bit, for the device to
normalise.

The crop is drawn from a hash of (seed, epoch, key), so that it depends on neither the world size nor the number of
workers, nor on what else is in the batch. A JPEG goes through libjpeg-turbo and OpenCV, which take a third of Pillow's
time; Pillow reads everything else, and what those refuse.
"""

from __future__ import annotations

import hashlib
import io
import math
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from PIL import Image
from torch.utils.data import get_worker_info

from infra.errors import UserError
from shards.sample import FORMATS, IMAGES, UNDECODABLE, BadSampleError

cv2.setNumThreads(1)  # each worker, or decoding thread, has its core
Pixels = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]
AREA_FROM = 2.0
"""Made smaller by this factor or more, a picture is averaged; by less, cubic interpolation shows no aliasing."""
_DRAWS = 5


@dataclass(frozen=True)
class RandomCrop:
    """Crops of random area and shape, `side` x `side` pixels; a stream's `decode`.

    `scale` is the least and the largest area, a share of the picture's; `ratio` the least and the largest width by
    height, drawn evenly on a logarithmic scale. A crop that would leave the picture is made smaller until it fits
    (Szegedy et al. 2015, "Going Deeper with Convolutions", section 6, would draw again). `flip` is the probability of
    a mirror image. With `decoder` `pillow`, pictures are decoded and resized (bicubic) by Pillow alone.
    """

    side: int = 224
    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    seed: int = 0
    decoder: Literal["turbo", "pillow"] = "turbo"

    def __post_init__(self) -> None:
        if self.side < 1 or not 0 < self.scale[0] <= self.scale[1] <= 1 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise UserError(
                f"crop: side {self.side}, scale {self.scale}, ratio {self.ratio}; the side starts at 1, areas and "
                "shapes are above 0, the least first, areas at most 1"
            )

    def __call__(self, sample: dict[str, Any]) -> None:
        """Replace a sample's picture by its crop, uint8 `[side, side, 3]` RGB, and its `txt` by text.

        Raises:
            BadSampleError: the picture cannot be decoded.
        """
        name = next((name for name in IMAGES if name in sample), None)
        if name is None:
            raise BadSampleError(f"{sample['__key__']} has no image")
        draws = drawn(self.seed, sample["__epoch__"], sample["__key__"])
        body = sample[name]
        pixels = decoded_jpeg(body) if self.decoder == "turbo" else None
        if pixels is not None:
            crop = resized(pixels, self.box(pixels.shape[1], pixels.shape[0], draws), self.side)
        else:
            crop = self._by_pillow(body, f"{sample['__key__']}.{name}", draws)
        sample[name] = crop[:, ::-1] if draws[4] < self.flip else crop
        if isinstance(sample.get("txt"), bytes):
            sample["txt"] = sample["txt"].decode("utf-8", "replace")

    def box(self, width: int, height: int, draws: tuple[float, ...]) -> Box:
        """Return the crop of a picture of `width` x `height` pixels: left, top, right, bottom."""
        share, shape, x, y = draws[:4]
        area = (self.scale[0] + share * (self.scale[1] - self.scale[0])) * width * height
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        ratio = math.exp(low + shape * (high - low))
        wide, tall = math.sqrt(area * ratio), math.sqrt(area / ratio)
        fit = min(1.0, width / wide, height / tall)
        wide_px, high_px = max(1, round(wide * fit)), max(1, round(tall * fit))
        left, top = int(x * (width - wide_px + 1)), int(y * (height - high_px + 1))
        return left, top, left + wide_px, top + high_px

    def _by_pillow(self, body: bytes, name: str, draws: tuple[float, ...]) -> Pixels:
        try:
            with Image.open(io.BytesIO(body), formats=FORMATS) as opened:
                image = opened if opened.mode == "RGB" else opened.convert("RGB")
                box = self.box(*image.size, draws)
                size = (self.side, self.side)
                return np.asarray(image.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=3.0))
        except UNDECODABLE as error:
            raise BadSampleError(f"{name} cannot be decoded: {error}") from None


def drawn(seed: int, epoch: int, key: str) -> tuple[float, ...]:
    """Return five even draws from [0, 1), a pure function of (seed, epoch, key)."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=8 * _DRAWS).digest()
    words = np.frombuffer(digest, "<u8") >> np.uint64(11)
    return tuple((words * 2.0**-53).tolist())


def collated(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Put cropped samples together: `image` uint8 `[B, 3, side, side]` (channels last), `txt` and `key` lists.

    Samples may be none: then the tensor is `[0, 3, 0, 0]`. In a loader's process the tensor is made in shared memory at
    once, which saves a copy on its way out.
    """
    first = next((samples[0][name] for name in IMAGES if name in samples[0]), None) if samples else None
    shape = (len(samples), *(first.shape if first is not None else (0, 0, 3)))
    image = torch.empty(shape, dtype=torch.uint8)
    if get_worker_info() is not None:
        image = torch.tensor([], dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(image.numel())).view(shape)
    out = image.numpy()
    for place, sample in enumerate(samples):
        out[place] = sample[next(name for name in IMAGES if name in sample)]
    return {
        "image": image.permute(0, 3, 1, 2),
        "txt": [sample.get("txt", "") for sample in samples],
        "key": [sample["__key__"] for sample in samples],
    }


def decoded_jpeg(body: bytes) -> Pixels | None:
    """Decode a sound colour or grey JPEG to RGB `[H, W, 3]`; None for all else, what is damaged too."""
    if body[:2] != b"\xff\xd8":
        return None
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(body)
        if height * width > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
            return None  # a bomb, which Pillow refuses by this bound
        return simplejpeg.decode_jpeg(body, "RGB", fastupsample=True)
    except (ValueError, RuntimeError, MemoryError):
        return None


def resized(pixels: Pixels, box: Box, side: int) -> Pixels:
    """Return the part `box` of a picture `[H, W, 3]` as `[side, side, 3]`."""
    left, top, right, bottom = box
    part = pixels[top:bottom, left:right]
    is_much = min(right - left, bottom - top) >= AREA_FROM * side
    mode = cv2.INTER_AREA if is_much else cv2.INTER_CUBIC
    return cv2.resize(part, (side, side), interpolation=mode).astype(np.uint8, copy=False)
