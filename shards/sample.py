"""One sample: from its bytes in a tar to the dictionary that webdataset pipelines pass on."""

from __future__ import annotations

import functools
import io
import json
import mmap
import re
import struct
import zlib
from typing import Any

import numpy as np
from PIL import AvifImagePlugin, Image, Jpeg2KImagePlugin, TiffImagePlugin, WebPImagePlugin

from shards.placeholder import removed_key
from shards.tar import BLOCK_BYTES, members, plain

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM")
"""Kinds of picture that are decoded, whatever the extension says; none that runs a program or opens other files."""
_REGISTERED = (AvifImagePlugin, Jpeg2KImagePlugin, TiffImagePlugin, WebPImagePlugin)
"""Plugins that Pillow does not load by itself before it is asked for their format."""
UNDECODABLE = (
    OSError, ValueError, SyntaxError, RuntimeError, MemoryError, EOFError, IndexError, OverflowError, struct.error,
    zlib.error, Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow and its plugins raise over a damaged picture."""
IMAGES = ("jpg", "jpeg", "png", "webp", "avif")
"""Extensions taken for the image of a pair."""

_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
_META = re.compile(r"__[^/]*__($|/)")


class BadSampleError(ValueError):
    """A sample that cannot be used; the message says why, in words."""


def split_name(name: str) -> tuple[str, str] | None:
    """Return (key, extension) of a member's name as webdataset splits it; None for one it passes over."""
    if "/" not in name and "\n" not in name and name[:2] != "__":  # most names: without the pattern's way back
        key, dot, extension = name.partition(".")
        return (key, extension.lower()) if key and dot else None
    match = _NAME.fullmatch(name)
    if match is None or _META.match(name):
        return None
    return match[1], match[2].lower()


def parse(data: bytes | mmap.mmap, needs: tuple[str, ...], start: int = 0, stop: int | None = None) -> dict[str, Any]:
    """Return the sample whose whole members `data[start:stop]` is: `__key__`, and the bytes of each member by
    extension.

    `needs` names what must be there: extensions, or `image` for any of `IMAGES`.

    Raises:
        BadSampleError: a damaged header, members of several keys, or something needed is missing.
    """
    stop = len(data) if stop is None else min(stop, len(data))
    sample = _plain_sample(data, start, stop) or _any_sample(data[start:stop])
    for need in needs:
        if need not in sample and (need != "image" or sample.keys().isdisjoint(IMAGES)):
            raise BadSampleError(f"{sample['__key__']} has no {need}")
    return sample


def _plain_sample(data: bytes | mmap.mmap, at: int, stop: int) -> dict[str, Any] | None:
    """Parse a sample as `ShardWriter` writes them; None for any other, which need not be a bad one."""
    sample: dict[str, Any] = {}
    lead = b""
    while at < stop:
        found = plain(data, at)
        if found is None:
            return None
        name, size = found
        if not lead:
            lead = name[: name.find(b".") + 1]
            if not lead[:-1].isalnum():
                return None
            sample["__key__"] = lead[:-1].decode()
        begin, at = at + BLOCK_BYTES, at + BLOCK_BYTES + (size + BLOCK_BYTES - 1 & -BLOCK_BYTES)
        suffix = _suffix(name[len(lead) :])
        if not suffix or suffix in sample or at > stop or not name.startswith(lead):
            return None
        sample[suffix] = data[begin : begin + size]
    return sample


@functools.lru_cache(maxsize=1024)
def _suffix(padded: bytes) -> str:
    """Return the extension that ends a header's name, padded with NUL; empty for one that is not plain."""
    suffix = padded.rstrip(b"\0")
    return suffix.decode().lower() if suffix.isalnum() else ""


def _any_sample(data: bytes) -> dict[str, Any]:
    """Parse a sample in any dialect. Raises BadSampleError."""
    try:
        found = members(data)
    except ValueError as error:
        raise BadSampleError(str(error)) from None
    sample: dict[str, Any] = {}
    for member in found:
        if removed_key(member.name) is not None:
            raise BadSampleError("it was taken down")
        split = split_name(member.name)
        if split is None:
            continue
        key, extension = split
        if extension.startswith("__"):
            continue  # such names are what the stream itself says of a sample
        if sample.setdefault("__key__", key) != key:
            raise BadSampleError(f"holds members of two samples, {sample['__key__']!r} and {key!r}")
        if extension in sample:
            raise BadSampleError(f"holds {member.name!r} twice")
        sample[extension] = data[member.start : member.start + member.size]
    if not sample:
        raise BadSampleError("holds no members")
    return sample


def decode(sample: dict[str, Any]) -> dict[str, Any]:
    """Decode a sample in place: images to uint8 RGB `[H, W, 3]`, `txt` to str, `json` to its value.

    Raises:
        BadSampleError: a member is not what its extension says.
    """
    for name, value in sample.items():
        if not isinstance(value, bytes):
            continue
        try:
            if name in IMAGES:
                with Image.open(io.BytesIO(value), formats=FORMATS) as image:
                    sample[name] = np.array(image.convert("RGB"))
            elif name == "txt":
                sample[name] = value.decode()
            elif name == "json":
                sample[name] = json.loads(value)
        except UNDECODABLE as error:
            raise BadSampleError(f"{sample['__key__']}.{name} cannot be decoded: {error}") from None
    return sample
