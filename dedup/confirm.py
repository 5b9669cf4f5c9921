"""A second look at pictures whose hashes are close: their pixels.

A perceptual hash sees 64x64 grey shapes: a black and a white heart, or a man and a woman in the same pose,
can hash alike. Two pictures are taken for the same one only if their thumbnails agree even where they
differ most.

Measured on 10,000 distinct pictures (`benchmarks/planted_copies.py`; most are emoji and clip art): 864 pairs of them
lie within 31 bits, of which 18 pass the threshold of 13, and 14 the look at detail; 15,826 within 80, of which 33 and
27 do. Nearly all of those 33 are one icon drawn twice, with a detail or a colour that hardly shows at 64 pixels a side.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image

from dedup.same_look import THUMBNAIL_PX
from infra.errors import RunError
from infra.storage import Folder, patiently
from shards.sample import FORMATS, UNDECODABLE


def made_at(
    shards: Folder, shard: str, offset: int, size: int, make: Callable[[bytes], npt.NDArray[np.uint8]]
) -> npt.NDArray[np.uint8]:
    """Return what `make` makes of the picture at `size` bytes from `offset` of a shard's tar.

    Raises:
        RunError: it cannot be read or decoded; the message says where it lies.
    """
    where = f"{shards.path(shard)}.tar: the image at byte {offset}"

    def read() -> bytes:
        return shards.read_range(f"{shard}.tar", offset, offset + size)

    try:
        data = read() if shards.is_local else patiently(f"{shards.url}: cannot be read", read)
    except OSError as error:
        raise RunError(f"{where} cannot be read ({error})") from None
    try:
        return make(data)
    except UNDECODABLE as error:
        raise RunError(f"{where} cannot be decoded ({error}); see what else is wrong with `pairmill verify`") from None


def thumbnail(data: bytes) -> npt.NDArray[np.uint8]:
    """Return an encoded picture as `[64, 64, 3]`, squeezed to a square."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        image.draft("RGB", (2 * THUMBNAIL_PX, 2 * THUMBNAIL_PX))
        return squeezed(image.convert("RGB"))


def squeezed(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Return an RGB picture as `[64, 64, 3]`."""
    return np.asarray(image.resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BILINEAR))
