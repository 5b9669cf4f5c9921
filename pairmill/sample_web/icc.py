"""A colour profile that is not sRGB, made by hand: the primaries and gamma of Adobe RGB (1998).

Pixels under it look wrong to a reader that ignores profiles and right to one that converts them.
"""

from __future__ import annotations

import functools
import io
import struct

from PIL import Image, ImageCms

# Adobe RGB (1998) Color Image Encoding, section 4.3, adapted to the profile connection space's D50.
WHITE_D50 = (0.96420, 1.00000, 0.82491)
RED = (0.60974, 0.31111, 0.01947)
GREEN = (0.20528, 0.62567, 0.06087)
BLUE = (0.14919, 0.06322, 0.74457)
GAMMA = 2.19921875


@functools.cache
def adobe_rgb_profile() -> bytes:
    """A matrix profile of version 2 (ICC.1:2001-04, sections 6.1 to 6.3)."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(GAMMA * 256))
    tags = [
        (b"desc", _description(b"Adobe RGB (1998) compatible")),
        (b"cprt", b"text" + bytes(4) + b"No copyright, use freely\0"),
        (b"wtpt", _xyz(WHITE_D50)),
        (b"rXYZ", _xyz(RED)),
        (b"gXYZ", _xyz(GREEN)),
        (b"bXYZ", _xyz(BLUE)),
        (b"rTRC", curve),
        (b"gTRC", curve),
        (b"bTRC", curve),
    ]
    table, data = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for signature, content in tags:
        table += signature + struct.pack(">II", start + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    header = bytearray(128)
    header[0:4] = struct.pack(">I", start + len(data))
    header[8:12] = b"\x02\x10\0\0"
    header[12:24] = b"mntrRGB XYZ "
    header[24:36] = struct.pack(">6H", 2021, 1, 5, 0, 0, 0)
    header[36:40] = b"acsp"
    header[68:80] = struct.pack(">3i", *(round(value * 65536) for value in WHITE_D50))
    return bytes(header) + table + data


def from_srgb(image: Image.Image) -> Image.Image:
    """The RGB image's colours expressed under the profile."""
    profile = ImageCms.ImageCmsProfile(io.BytesIO(adobe_rgb_profile()))
    converted = ImageCms.profileToProfile(image, ImageCms.createProfile("sRGB"), profile, outputMode="RGB")
    assert converted is not None
    return converted


def _xyz(values: tuple[float, float, float]) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in values))


def _description(text: bytes) -> bytes:
    # ASCII part, then empty Unicode and ScriptCode parts, as the type demands.
    return b"desc" + bytes(4) + struct.pack(">I", len(text) + 1) + text + b"\0" + bytes(8) + bytes(70)
