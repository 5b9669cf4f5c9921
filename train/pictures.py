"""Pictures of samples, decoded once where memory allows."""

from __future__ import annotations

import io
import threading

from PIL import Image

from shards.sample import FORMATS, IMAGES, UNDECODABLE, BadSampleError
from shards.stream import Sample
from train.augment import framed


class DecodedCache:
    """Decoded pictures with their margin by key, as long as they fit into `limit_bytes`; the first ones stay."""

    def __init__(self, limit_bytes: int, margin: float = 0.0) -> None:
        self.limit_bytes, self.margin = limit_bytes, margin
        self.held_bytes = 0
        self._pictures: dict[str, Image.Image] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[DecodedCache], tuple[int, float]]:
        return DecodedCache, (self.limit_bytes, self.margin)  # a loader process begins with an empty one

    def picture(self, sample: Sample) -> Image.Image:
        """Return a sample's picture, RGB. Raises BadSampleError if it cannot be decoded."""
        key = f"{sample.get('__index__', '')}/{sample['__key__']}"
        found = self._pictures.get(key)
        if found is None:
            found = framed(decode(sample), self.margin)
            size = 4 * found.width * found.height  # Pillow holds four bytes a pixel
            with self._lock:
                if key not in self._pictures and self.held_bytes + size <= self.limit_bytes:
                    self._pictures[key] = found
                    self.held_bytes += size
        return found


def decode(sample: Sample) -> Image.Image:
    """Decode a sample's picture to RGB. Raises BadSampleError with its key if it cannot be decoded."""
    extension = next(name for name in IMAGES if name in sample)
    try:
        with Image.open(io.BytesIO(sample[extension]), formats=FORMATS) as image:
            return image.convert("RGB")
    except UNDECODABLE as error:
        where = f"{sample.get('__url__', '')} {sample['__key__']}.{extension}".strip()
        raise BadSampleError(f"{where}: not a picture ({error})") from None
