"""One body to one picture of the corpus: decode, orient, colours to sRGB, resize, encode, hash."""

from __future__ import annotations

import functools
import hashlib
import io
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import (
    AvifImagePlugin,
    IcoImagePlugin,
    Image,
    ImageCms,
    Jpeg2KImagePlugin,
    MpoImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from ingest import turbo
from ingest.blur import Box, blurred
from ingest.config import ImageConfig
from ingest.geometry import STATUS_OF, Geometry, geometry, size_reason
from shards.layout import Reason, Status
from shards.pdq import pdq

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "JPEG2000", "ICO", "PPM")
"""Raster formats that are decoded; nothing that runs a program or refers to other files."""
_REGISTERED = (
    AvifImagePlugin, IcoImagePlugin, Jpeg2KImagePlugin, MpoImagePlugin, TiffImagePlugin, WebPImagePlugin,
)  # fmt: skip
"""Plugins that Pillow would import on its own only in some cases, from which thread one cannot say."""
BROKEN = (
    OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, OverflowError, MemoryError,
    ZeroDivisionError, AttributeError, AssertionError, RuntimeError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow's decoders raise on malformed files, by their sources."""
EXIF_ORIENTATION = 0x0112
_TURNED = {5, 6, 7, 8}
_ENCODINGS = {"jpg": "JPEG", "webp": "WEBP", "png": "PNG"}
_GREY_WITH_MORE_BITS = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
_SHARED = ImageCms.Flags.NOCACHE  # lets several threads use one transform
MAX_PROFILE_BYTES = 4 * 2**20
"""Embedded profiles beyond it are ignored; the largest in use, of CMYK presses, have 1 to 3 MB."""
_TRANSFORMS_KEPT = 16
STRIP_PIXELS = 2**20
_CMS_MODES = ("L", "RGB", "CMYK", "LAB")

# By the profile's digest, oldest first: the profiles themselves would stay in memory as keys.
_transforms: dict[tuple[bytes, str], ImageCms.ImageCmsTransform | None] = {}
_transforms_lock = threading.Lock()

Image.preinit()


@dataclass(frozen=True)
class Picture:
    """A picture of the corpus: its encoded bytes, sizes in pixels, perceptual hash (64 hex characters)."""

    data: bytes
    width: int
    height: int
    original_width: int
    original_height: int
    phash: str | None
    phash_quality: int | None


@dataclass(frozen=True)
class Refusal:
    """Why a body is no picture of the corpus; its size in pixels where a header gave one."""

    status: Status
    reason: Reason
    detail: str
    original_width: int | None = None
    original_height: int | None = None


def process(body: bytes, config: ImageConfig, boxes: Sequence[Box] = ()) -> Picture | Refusal:
    """Turn the body of an answer into a picture of the corpus, or say why not. Never raises for what is in it.

    What lies in `boxes` is blurred.
    """
    try:
        image = Image.open(io.BytesIO(body), formats=FORMATS)
    except UnidentifiedImageError:
        return Refusal(Status.FAILED_TO_RESIZE, Reason.NOT_AN_IMAGE, f"begins with {body[:12]!r}")
    except Image.DecompressionBombError as error:
        return _bomb(error)
    except BROKEN as error:
        return _broken(error)
    with image:
        try:
            return _process(image, body, config, boxes)
        except BROKEN as error:
            return _broken(error)


def refusal_by_header(start: bytes, config: ImageConfig) -> Refusal | None:
    """Judge a picture by the first bytes of its body: a refusal if its size is out of bounds.

    None means that nothing speaks against it, or that the header is not whole yet.
    """
    try:
        with Image.open(io.BytesIO(start), formats=FORMATS) as image:
            return _refused_size(*_oriented_size(image), config)
    except Image.DecompressionBombError as error:
        return _bomb(error)
    except BROKEN:
        return None


def _process(image: Image.Image, body: bytes, config: ImageConfig, boxes: Sequence[Box]) -> Picture | Refusal:
    width, height = _oriented_size(image)
    refusal = _refused_size(width, height, config)
    if refusal is not None:
        return refusal
    target = geometry(width, height, config)
    if config.skip_reencode and not boxes and _may_stay(image, target, config):
        image.load()
        return _picture(image.convert("RGB"), body, (width, height), config)
    if not boxes and _is_plain(image, target, config):
        shrunk = turbo.shrunk(body, width, height, target)
        if shrunk is not None:
            return _picture(shrunk, turbo.encoded(shrunk, config.quality), (width, height), config)
    image.draft(None, _drafted(image, target))
    orientation = _orientation(image)
    icc = image.info.get("icc_profile")
    pixels = _eight_bits(image)
    size = (target.height, target.width) if orientation in _TURNED else (target.width, target.height)
    pixels = _resized(pixels, size)
    pixels = _to_rgb(pixels, icc, config.background_rgb)
    pixels = blurred(_upright(pixels, orientation), boxes)
    pixels = _on_canvas(pixels, target.canvas, config.background_rgb)
    return _picture(pixels, _encoded(pixels, config), (width, height), config)


def _picture(
    pixels: Image.Image | NDArray[np.uint8], data: bytes, original: tuple[int, int], config: ImageConfig
) -> Picture:
    phash = quality = None
    if config.phash:
        phash, quality = pdq(pixels)
    width, height = pixels.size if isinstance(pixels, Image.Image) else pixels.shape[1::-1]
    return Picture(data, width, height, *original, phash, quality)


def _bomb(error: Image.DecompressionBombError) -> Refusal:
    """Refuse what Pillow itself will not open: its limit is the most that `max_pixels` can be."""
    return Refusal(Status.FAILED_TO_RESIZE, Reason.TOO_MANY_PIXELS, " ".join(str(error).split())[:200])


def _broken(error: BaseException) -> Refusal:
    detail = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return Refusal(Status.FAILED_TO_RESIZE, Reason.DECODE_ERROR, detail)


def _refused_size(width: int, height: int, config: ImageConfig) -> Refusal | None:
    reason = size_reason(width, height, config)
    if not reason:
        return None
    status = STATUS_OF.get(reason, Status.FAILED_TO_RESIZE)
    return Refusal(status, reason, f"{width}x{height} pixels", width, height)


def _orientation(image: Image.Image) -> int:
    if "exif" not in image.info and image.format not in ("TIFF", "PNG", "MPO"):
        return 1
    try:
        value = image.getexif().get(EXIF_ORIENTATION, 1)
    except BROKEN:  # damaged metadata do not make the picture worthless
        return 1
    return value if isinstance(value, int) else 1


def _oriented_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if _orientation(image) in _TURNED else (width, height)


def _may_stay(image: Image.Image, target: Geometry, config: ImageConfig) -> bool:
    return (
        image.format == _ENCODINGS[config.format]
        and image.mode in ("RGB", "L")
        and image.size == target.canvas == (target.width, target.height)
        and _orientation(image) == 1
        and _profile_transform(image.info.get("icc_profile"), "RGB") is None
        and not getattr(image, "is_animated", False)
    )


def _is_plain(image: Image.Image, target: Geometry, config: ImageConfig) -> bool:
    return (
        config.format == "jpg"
        and image.format == "JPEG"
        and image.mode == "RGB"
        and target.canvas == (target.width, target.height)
        and _orientation(image) == 1
        and _profile_transform(image.info.get("icc_profile"), "RGB") is None
    )


def _drafted(image: Image.Image, target: Geometry) -> tuple[int, int]:
    """Return the least size the JPEG decoder may scale to: never under the target, in the file's orientation."""
    if _orientation(image) in _TURNED:
        return target.height, target.width
    return target.width, target.height


def _eight_bits(image: Image.Image) -> Image.Image:
    """Decode the first frame as L, LA, RGB, RGBA, CMYK or LAB, with 8 bits a channel."""
    mode = image.mode
    if mode in _GREY_WITH_MORE_BITS:
        return _scaled_grey(image)
    if mode == "P":
        return image.convert("RGBA" if "transparency" in image.info else "RGB")
    if mode in ("PA", "La", "RGBa"):
        return image.convert("RGBA")
    if mode in ("L", "RGB") and "transparency" in image.info:
        return image.convert("RGBA")
    if mode == "1":
        return image.convert("L")
    if mode not in ("L", "LA", "RGB", "RGBA", "CMYK", "LAB"):
        return image.convert("RGB")
    image.load()
    return image


def _scaled_grey(image: Image.Image) -> Image.Image:
    """Scale grey values of more than 8 bits; Pillow's own conversion would cut them off at 255.

    In strips: of a whole picture the values as float32, and each step of the sum, are as large as four of it.
    """
    image.load()
    scale = 255.0 / _white(image)
    grey = Image.new("L", image.size)
    for top, values in _strips(image):
        scaled = np.nan_to_num(values.astype(np.float32) * scale).clip(0, 255)
        grey.paste(Image.fromarray((scaled + 0.5).astype(np.uint8)), (0, top))
    return grey


def _white(image: Image.Image) -> float:
    """Return the grey value that is white: of the widths in use, the least that holds all values there are."""
    if image.mode not in ("F", "I"):
        return float(0xFFFF)
    most = float(np.fmax.reduce([np.fmax.reduce(values, axis=None) for _, values in _strips(image)]))
    if image.mode == "F":
        return 1.0 if most <= 1.0 else 255.0
    return float(2**31 - 1) if most > 0xFFFF else float(0xFFFF)


def _strips(image: Image.Image) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield a picture's values in strips of whole rows, `[H, W]`, each with the number of its first row."""
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))


def _resized(pixels: Image.Image, size: tuple[int, int]) -> Image.Image:
    if pixels.size == size:
        return pixels
    if size[0] * size[1] > pixels.width * pixels.height:
        return pixels.resize(size, Image.Resampling.LANCZOS)
    return pixels.resize(size, Image.Resampling.HAMMING, reducing_gap=2.0)


def _to_rgb(pixels: Image.Image, icc: bytes | None, background: tuple[int, int, int]) -> Image.Image:
    """Return an RGB picture in sRGB, with what is transparent laid on the background."""
    alpha = None
    if pixels.mode == "LA":
        pixels = pixels.convert("RGBA")
    if pixels.mode == "RGBA":
        alpha = pixels.getchannel("A")
        pixels = pixels.convert("RGB")
    transform = _profile_transform(icc, pixels.mode)
    if transform is not None:
        pixels = ImageCms.applyTransform(pixels, transform) or pixels
    elif pixels.mode == "LAB":
        pixels = ImageCms.applyTransform(pixels, _lab_transform()) or pixels
    elif pixels.mode != "RGB":
        pixels = pixels.convert("RGB")
    if alpha is not None and alpha.getextrema() != (255, 255):
        ground = Image.new("RGB", pixels.size, background)
        ground.paste(pixels, mask=alpha)
        pixels = ground
    return pixels


def _profile_transform(icc: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the way from an embedded profile to sRGB; None without one, for sRGB itself, and for a broken one."""
    if not icc or mode not in _CMS_MODES or len(icc) > MAX_PROFILE_BYTES:
        return None
    key = (hashlib.sha256(icc).digest(), mode)
    with _transforms_lock:
        if key not in _transforms:
            while len(_transforms) >= _TRANSFORMS_KEPT:
                del _transforms[next(iter(_transforms))]
            _transforms[key] = _built_transform(icc, mode)
        return _transforms[key]


def _built_transform(icc: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        if "srgb" in ImageCms.getProfileDescription(profile).lower():
            return None
        return ImageCms.buildTransform(profile, _srgb(), mode, "RGB", flags=_SHARED)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


@functools.cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


@functools.cache
def _lab_transform() -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(ImageCms.createProfile("LAB"), _srgb(), "LAB", "RGB", flags=_SHARED)


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(pixels: Image.Image, orientation: int) -> Image.Image:
    turn = _TURNS.get(orientation)
    return pixels if turn is None else pixels.transpose(turn)


def _on_canvas(pixels: Image.Image, canvas: tuple[int, int], background: tuple[int, int, int]) -> Image.Image:
    """Cut the middle out of a picture larger than the canvas; put a border around a smaller one."""
    if pixels.size == canvas:
        return pixels
    left, top = _half(pixels.width - canvas[0]), _half(pixels.height - canvas[1])
    if left >= 0 and top >= 0:
        return pixels.crop((left, top, left + canvas[0], top + canvas[1]))
    ground = Image.new("RGB", canvas, background)
    ground.paste(pixels, (-left, -top))
    return ground


def _half(extent: int) -> int:
    return extent // 2 if extent >= 0 else -(-extent // 2)


def _encoded(pixels: Image.Image, config: ImageConfig) -> bytes:
    buffer = io.BytesIO()
    if config.format == "jpg":
        pixels.save(buffer, "JPEG", quality=config.quality)
    elif config.format == "webp":
        pixels.save(buffer, "WEBP", quality=config.quality)
    else:
        pixels.save(buffer, "PNG", icc_profile=None)  # else a profile that was ignored would come along
    return buffer.getvalue()
