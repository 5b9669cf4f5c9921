"""One sample: from its bytes in a tar to the dictionary that webdataset pipelines pass on."""

from __future__ import annotations

import io
import json
import re
from typing import Any

import numpy as np
from PIL import Image

from shards.tar import members

IMAGES = ("jpg", "jpeg", "png", "webp", "avif")
"""Extensions taken for the image of a pair."""

_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
_META = re.compile(r"__[^/]*__($|/)")


class BadSampleError(ValueError):
    """A sample that cannot be used; the message says why, in words."""


def split_name(name: str) -> tuple[str, str] | None:
    """Return (key, extension) of a member's name as webdataset splits it; None for one it passes over."""
    match = _NAME.fullmatch(name)
    if match is None or _META.match(name):
        return None
    return match[1], match[2].lower()


def parse(data: bytes, needs: tuple[str, ...]) -> dict[str, Any]:
    """Return the sample whose whole members `data` holds: `__key__`, and the bytes of each member by
    extension.

    `needs` names what must be there: extensions, or `image` for any of `IMAGES`.

    Raises:
        BadSampleError: a damaged header, members of several keys, or something needed is missing.
    """
    try:
        found = members(data)
    except ValueError as error:
        raise BadSampleError(str(error)) from None
    sample: dict[str, Any] = {}
    for member in found:
        split = split_name(member.name)
        if split is None:
            continue
        key, extension = split
        if sample.setdefault("__key__", key) != key:
            raise BadSampleError(f"holds members of two samples, {sample['__key__']!r} and {key!r}")
        if extension in sample:
            raise BadSampleError(f"holds {member.name!r} twice")
        sample[extension] = data[member.start : member.start + member.size]
    if not sample:
        raise BadSampleError("holds no members")
    for need in needs:
        if not any(name in sample for name in (IMAGES if need == "image" else (need,))):
            raise BadSampleError(f"{sample['__key__']} has no {need}")
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
                with Image.open(io.BytesIO(value)) as image:
                    sample[name] = np.array(image.convert("RGB"))
            elif name == "txt":
                sample[name] = value.decode()
            elif name == "json":
                sample[name] = json.loads(value)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise BadSampleError(f"{sample['__key__']}.{name} cannot be decoded: {error}") from None
    return sample
