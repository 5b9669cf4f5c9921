"""The common case, a plain JPEG made smaller: libjpeg-turbo and OpenCV do it in less time than Pillow.

Same choices as `ingest.image` makes with Pillow: scaled by halves while decoding, never under the target, and
brought to size by area. What is not plain (turned, CMYK, with another colour space, damaged) is left to Pillow.
"""

from __future__ import annotations

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from ingest.geometry import Geometry

DCT_FACTORS = (8, 4, 2, 1)
"""By these a block of 8 x 8 coefficients is scaled with little loss; libjpeg-turbo's other eighths cost 3 dB."""


def shrunk(body: bytes, width: int, height: int, target: Geometry) -> NDArray[np.uint8] | None:
    """Decode a colour JPEG of `width` x `height` pixels at the target's size, as `[H, W, 3]` RGB.

    Returns None where Pillow should decide: the target is larger than the picture, or the file is damaged.
    """
    if target.width > width or target.height > height:
        return None
    factor = next((f for f in DCT_FACTORS if width // f >= target.width and height // f >= target.height), 1)
    try:
        pixels = simplejpeg.decode_jpeg(
            body, "RGB", min_height=-(-height // factor), min_width=-(-width // factor), min_factor=1
        )
    except (ValueError, RuntimeError, MemoryError):
        return None
    if pixels.shape[1::-1] == (target.width, target.height):
        return pixels
    return cv2.resize(pixels, (target.width, target.height), interpolation=cv2.INTER_AREA)


def encoded(pixels: NDArray[np.uint8], quality: int) -> bytes:
    """Encode `[H, W, 3]` RGB pixels as a JPEG, with colours at half the resolution as everybody writes them."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB", "420")
