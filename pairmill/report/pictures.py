"""Pictures as `data:` URLs: small, sound, and never more than the page can carry."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from dataclasses import dataclass

from PIL import Image, ImageOps

SIDE_PX = 128
"""Longest side of a picture on the page."""
AS_IT_IS_BYTES = 12_000
"""A small picture of at most so many bytes is taken over without encoding it anew."""
PIXEL_LIMIT = 40_000_000
PAGE_BYTES = 4_200_000
"""What all pictures of a page may take together, in the base64 that the page holds."""

_DECODED = ("JPEG", "PNG", "WEBP", "GIF", "AVIF")
_SHOWN_AS_IT_IS = ("JPEG", "PNG", "WEBP")
_BROKEN = (
    OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, OverflowError, MemoryError,
    ZeroDivisionError, AttributeError, AssertionError, RuntimeError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow's decoders raise on malformed files, by their sources."""


@dataclass(frozen=True)
class Picture:
    """A picture on the page: a `data:` URL, its size in pixels, and what it shows in words."""

    data: str
    width: int
    height: int
    alt: str


@dataclass
class Album:
    """All pictures of one page; takes them while there is room."""

    room_bytes: int = PAGE_BYTES
    shown: int = 0
    broken: int = 0
    no_room: int = 0

    def take(self, body: bytes, alt: str) -> Picture | None:
        """Return an encoded picture for the page; None if it cannot be decoded or the page is full (counted)."""
        made = thumbnail(body)
        if made is None:
            self.broken += 1
            return None
        kind, data, (width, height) = made
        text = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        if len(text) > self.room_bytes:
            self.no_room += 1
            return None
        self.room_bytes -= len(text)
        self.shown += 1
        return Picture(text, width, height, alt or "a picture without a caption")


def thumbnail(body: bytes) -> tuple[str, bytes, tuple[int, int]] | None:
    """Return (image subtype, bytes, (width, height)) with no side above `SIDE_PX`; None if it cannot be decoded."""
    try:
        with Image.open(io.BytesIO(body), formats=_DECODED) as image:
            if image.width * image.height > PIXEL_LIMIT:
                return None
            small = max(image.size) <= SIDE_PX and len(body) <= AS_IT_IS_BYTES
            if small and image.format in _SHOWN_AS_IT_IS:
                kind, size = image.format.lower(), image.size
                image.load()
                return kind, body, size
            image.draft("RGB", (2 * SIDE_PX, 2 * SIDE_PX))
            return _encoded(ImageOps.exif_transpose(image))
    except _BROKEN:
        return None


def _encoded(image: Image.Image) -> tuple[str, bytes, tuple[int, int]]:
    has_alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    pixels = image.convert("RGBA" if has_alpha else "RGB")
    pixels.thumbnail((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    pixels.save(out, "WEBP", quality=82, method=4)
    return "webp", out.getvalue(), pixels.size
