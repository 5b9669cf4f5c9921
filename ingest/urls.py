"""How a URL is sent, and the order that comes of it."""

from __future__ import annotations

import hashlib
import re

from yarl import URL

from shards.urls import MAX_URL_CHARACTERS, NO_URL, canonical, host_of

__all__ = ["MAX_URL_CHARACTERS", "as_sent", "canonical", "host_of", "order_of"]
_UNDECODED = re.compile("[\udc80-\udcff]")


def as_sent(url: str) -> str | None:
    """Return a URL in ASCII, as it is sent: the host in IDNA, the rest percent-encoded; None if it has no such form.

    Bytes of a header that are no UTF-8, which the HTTP client leaves as lone surrogates, are encoded as they came.
    """
    if len(url) > MAX_URL_CHARACTERS:
        return None
    if url.isascii():
        return url
    try:
        return str(URL(_UNDECODED.sub(lambda byte: f"%{ord(byte[0]) - 0xDC00:02X}", url)))
    except NO_URL:
        return None


def order_of(canonical_url: str, seed: int) -> tuple[int, int]:
    """Return the place of a URL in the shuffled order: two 64-bit numbers of its keyed BLAKE2b digest."""
    digest = hashlib.blake2b(
        canonical_url.encode("utf-8", "surrogatepass"), digest_size=16, key=f"order-{seed}".encode()
    ).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")
