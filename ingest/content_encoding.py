"""Bodies that come packed although nobody asked for it: what is unpacked, within a bound, and what is not."""

from __future__ import annotations

import zlib
from collections.abc import Callable

UNPACKED = ("gzip", "x-gzip", "deflate")
"""Content-Encodings that are undone here."""
_TRIED_BYTES = 16 * 1024


def still_encoded(encoding: str | None) -> str | None:
    """Return the Content-Encoding of a body that `unpacker` leaves as it is; None where there is none to undo."""
    is_plain = encoding is None or encoding.strip().lower() in ("", "identity", *UNPACKED)
    return None if is_plain else encoding


def unpacker(encoding: str | None, max_bytes: int) -> Callable[[bytes], bytes] | None:
    """Return what unpacks one chunk after another, never to more than one byte above `max_bytes` in all.

    Encodings are not asked for, yet some hosts send them. A body that says gzip and is not is left as it is; so is
    one that says deflate and is neither zlib's form of it nor the raw one, which browsers take too.
    """
    name = encoding.strip().lower() if encoding is not None else ""
    if name not in UNPACKED:
        return None
    first_byte = b"\x78" if name == "deflate" else b"\x1f"
    packed: bool | None = None
    stream = zlib.decompressobj(wbits=47)
    total = 0

    def unpack(chunk: bytes) -> bytes:
        nonlocal packed, stream, total
        if packed is None:
            packed = chunk[:1] == first_byte
            if not packed and name == "deflate" and _is_raw_deflate(chunk):
                packed, stream = True, zlib.decompressobj(wbits=-15)
        if packed:
            chunk = stream.decompress(chunk, max(1, max_bytes + 1 - total))
            total += len(chunk)
        return chunk

    return unpack


def _is_raw_deflate(start: bytes) -> bool:
    try:
        return bool(zlib.decompressobj(wbits=-15).decompress(start, _TRIED_BYTES))
    except zlib.error:
        return False
