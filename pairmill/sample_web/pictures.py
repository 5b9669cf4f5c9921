"""Encodes the archive's pictures as the image files of a web: good ones, copies, and every odd kind.

Every function is a pure function of the picture, so that the same URL always gives the same bytes.
"""

from __future__ import annotations

import functools
import io
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from pairmill.sample_web import icc
from pairmill.sample_web.archive import WHITE, Picture, by_key

SIDE_PX = 128
BOMB_SIDE_PX = 60_000
CONTENT_TYPES = {
    "jpg": "image/jpeg",
    "png": "image/png",
    "webp": "image/webp",
    "avif": "image/avif",
    "gif": "image/gif",
    "svg": "image/svg+xml",
}


@dataclass(frozen=True)
class ImageFile:
    """An image file's content and the content type a right server would give it."""

    body: bytes
    content_type: str


def extension(picture: Picture) -> str:
    """The format in which the good web serves the picture: about two thirds JPEG, the rest PNG and WebP."""
    return random.Random(f"format/{picture.key}").choices(("jpg", "png", "webp"), (65, 20, 15))[0]


def good_path(key: str) -> str:
    """The path of the picture on the good web. Raises KeyError for an unknown key."""
    return f"/images/{key}.{extension(by_key()[key])}"


def copy_path(key: str, number: int) -> str:
    """The path of another URL with the same bytes as `good_path`."""
    return f"/copies/{number}/{key}.{extension(by_key()[key])}"


def variant_path(key: str, name: str) -> str:
    """The path of the picture re-encoded and resized; `name` is one of VARIANTS."""
    return f"/resized/{name}/{key}.{VARIANTS[name][0]}"


@functools.lru_cache(maxsize=8192)
def good(key: str) -> ImageFile:
    """The picture whose key this is as the good web serves it: on white, 128 pixels a side.

    JPEG comes baseline or progressive, at qualities 85 to 92. Raises KeyError for an unknown key.
    """
    picture = by_key()[key]
    draw = random.Random(f"encoding/{key}")
    image = picture.image(SIDE_PX)
    form = extension(picture)
    if form == "png":
        return _png(image)
    if form == "webp":
        return _file(image, "webp", quality=draw.randint(82, 92))
    return _jpeg(image, quality=draw.randint(85, 92), progressive=draw.random() < 0.3)


@functools.lru_cache(maxsize=1024)
def variant(key: str, name: str) -> ImageFile:
    """The picture re-encoded and resized as another site would show it; `name` is one of VARIANTS.

    Raises KeyError for an unknown key or name.
    """
    return VARIANTS[name][1](by_key()[key])


@functools.lru_cache(maxsize=1024)
def odd(kind: str, key: str) -> ImageFile:
    """The picture as a file of an odd kind, one of ODD_KINDS. Raises KeyError for an unknown key or kind."""
    return ODD_KINDS[kind](by_key()[key])


def _file(image: Image.Image, form: str, **options: object) -> ImageFile:
    buffer = io.BytesIO()
    image.save(buffer, {"jpg": "JPEG"}.get(form, form.upper()), **options)
    return ImageFile(buffer.getvalue(), CONTENT_TYPES[form])


def _jpeg(image: Image.Image, **options: object) -> ImageFile:
    return _file(image, "jpg", **{"quality": 88, **options})


def _png(image: Image.Image) -> ImageFile:
    return _file(image, "png", compress_level=6)


def _baseline(picture: Picture) -> ImageFile:
    return _jpeg(picture.image(SIDE_PX), quality=90)


def _progressive(picture: Picture) -> ImageFile:
    return _jpeg(picture.image(SIDE_PX), progressive=True)


def _cmyk(picture: Picture) -> ImageFile:
    return _jpeg(picture.image(SIDE_PX).convert("CMYK"), quality=92)


def _grey(picture: Picture) -> ImageFile:
    return _jpeg(picture.image(SIDE_PX).convert("L"))


def _png_16_bit(picture: Picture) -> ImageFile:
    # Pillow writes 16 bits for grey only, so this file is put together by hand.
    pixels = np.asarray(picture.image(SIDE_PX)).astype(">u2") * 257
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return ImageFile(_png_file(SIDE_PX, SIDE_PX, depth=16, colour=2, data=zlib.compress(rows)), "image/png")


def _palette_alpha(picture: Picture) -> ImageFile:
    drawn = picture.rgba(SIDE_PX).quantize(128, method=Image.Quantize.FASTOCTREE)
    return _file(drawn, "png", compress_level=6)


def _animated_gif(picture: Picture) -> ImageFile:
    upright = picture.image(SIDE_PX)
    frames = [upright.rotate(angle, fillcolor=WHITE).quantize(64) for angle in (0, 15, -15)]
    return _file(frames[0], "gif", save_all=True, append_images=frames[1:], duration=200, loop=0)


def _webp(picture: Picture) -> ImageFile:
    return _file(picture.rgba(SIDE_PX), "webp", quality=85)


def _avif(picture: Picture) -> ImageFile:
    return _file(picture.image(SIDE_PX), "avif", quality=80, speed=8)


def _exif_rotated(picture: Picture) -> ImageFile:
    # Orientation 6 asks for a quarter turn clockwise; the stored pixels are turned the other way.
    upright = ImageOps.pad(picture.image(SIDE_PX), (SIDE_PX + 32, SIDE_PX), color=WHITE)
    exif = Image.Exif()
    exif[0x0112] = 6
    return _jpeg(upright.transpose(Image.Transpose.ROTATE_90), exif=exif)


def _icc_profile(picture: Picture) -> ImageFile:
    return _jpeg(icc.from_srgb(picture.image(SIDE_PX)), quality=92, icc_profile=icc.adobe_rgb_profile())


def _truncated(picture: Picture) -> ImageFile:
    whole = _jpeg(picture.image(SIDE_PX), quality=92).body
    return ImageFile(whole[: len(whole) * 6 // 10], "image/jpeg")


def _zero_bytes(picture: Picture) -> ImageFile:
    return ImageFile(b"", "image/jpeg")


def _svg(picture: Picture) -> ImageFile:
    text = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 100"><title>{picture.hexcode}</title>'
        '<circle cx="50" cy="50" r="40" fill="#fc3"/></svg>'
    )
    return ImageFile(text.encode(), CONTENT_TYPES["svg"])


def _too_small(picture: Picture) -> ImageFile:
    return _png(picture.image(8))


def _wide_banner(picture: Picture) -> ImageFile:
    return _jpeg(ImageOps.pad(picture.image(64), (640, 64), color=WHITE))


def _header_bomb(picture: Picture) -> ImageFile:
    """A header that announces 3.6 billion pixels, and a few rows of them."""
    rows = zlib.compress(b"\0" * (1 + BOMB_SIDE_PX // 8) * 64)
    return ImageFile(_png_file(BOMB_SIDE_PX, BOMB_SIDE_PX, depth=1, colour=0, data=rows), "image/png")


def _png_file(width: int, height: int, *, depth: int, colour: int, data: bytes) -> bytes:
    """A PNG file (W3C PNG, section 5) of one IDAT chunk that holds `data`, which is compressed already."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    parts = [struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


Encoder = Callable[[Picture], ImageFile]

# The name in the URL, its extension, and how the copy is made.
VARIANTS: dict[str, tuple[str, Encoder]] = {
    "jpeg60": ("jpg", lambda picture: _jpeg(picture.image(SIDE_PX), quality=60)),
    "webp75": ("webp", lambda picture: _file(picture.image(SIDE_PX), "webp", quality=75)),
    "small": ("jpg", lambda picture: _jpeg(picture.image(SIDE_PX * 3 // 4), quality=85)),
    "large": ("jpg", lambda picture: _jpeg(picture.image(SIDE_PX * 3 // 2), quality=80)),
}

ODD_KINDS: dict[str, Encoder] = {
    "baseline": _baseline,
    "progressive": _progressive,
    "cmyk": _cmyk,
    "grey": _grey,
    "png_16_bit": _png_16_bit,
    "palette_alpha": _palette_alpha,
    "animated_gif": _animated_gif,
    "webp": _webp,
    "avif": _avif,
    "exif_rotated": _exif_rotated,
    "icc_profile": _icc_profile,
    "truncated_image": _truncated,
    "zero_bytes": _zero_bytes,
    "svg": _svg,
    "too_small": _too_small,
    "wide_banner": _wide_banner,
    "header_bomb": _header_bomb,
}
