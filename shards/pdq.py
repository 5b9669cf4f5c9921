"""PDQ, the perceptual hash by which pictures are told to be alike."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pdqhash
from PIL import Image

PDQ_SIDE_PX = 256
"""A picture with a shorter side is brought to this size before it is hashed."""


def pdq(pixels: Image.Image | npt.NDArray[np.uint8]) -> tuple[str, int]:
    """Return PDQ's 256-bit hash of an RGB picture (`[H, W, 3]` as an array) as 64 hex characters, and its quality.

    The quality is 0 to 100.

    Facebook, "The TMK+PDQF Video-Hashing Algorithm and the PDQ Image-Hashing Algorithm" (2019), section 4.
    A picture with a side below 256 pixels is brought to 256x256 first: PDQ samples 64x64 points, and on fewer
    pixels than a few for each point one picture in two sizes hashes 20 bits apart and more.
    """
    values = np.asarray(pixels)
    if min(values.shape[:2]) < PDQ_SIDE_PX:
        small = Image.fromarray(values).resize((PDQ_SIDE_PX, PDQ_SIDE_PX), Image.Resampling.BILINEAR)
        values = np.asarray(small)
    bits, quality = pdqhash.compute(values)
    return np.packbits(bits.astype(np.uint8)).tobytes().hex(), int(quality)
