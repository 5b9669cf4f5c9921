"""Numbers, addresses and other people's words, as the page says them."""

from __future__ import annotations

import re
import unicodedata
from typing import Any
from urllib.parse import urlsplit

from markupsafe import Markup

CAPTION_CHARACTERS, ADDRESS_CHARACTERS, NAME_CHARACTERS = 240, 160, 80
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_JOINERS = "\u200c\u200d"
"""Format characters that letters and emoji are spelt with; all others (turned direction, tags) are taken out."""

REASONS = {
    "bad_url": "not an address that can be fetched",
    "blocked_address": "the address leads into a private network",
    "dns": "the host's name is not known",
    "connect": "the host does not answer",
    "tls": "no sound TLS connection",
    "timeout": "no answer in time",
    "too_slow": "the answer came too slowly",
    "http_status": "the server answered with an error",
    "too_many_redirects": "sent on and on to another address",
    "too_large": "the body is larger than allowed",
    "truncated_body": "the body ended too early",
    "connection_reset": "the connection broke",
    "crawler_error": "the crawler itself failed",
    "robots_txt": "the host's robots.txt forbids it",
    "opt_out": "the rights holder opted out",
    "not_an_image": "the body is no picture",
    "content_encoding": "the body came in an encoding that is not unpacked",
    "decode_error": "the picture is damaged",
    "too_many_pixels": "more pixels than are decoded",
    "too_small": "a side is too short",
    "aspect": "too long and narrow",
    "caption_empty": "no caption",
    "caption_too_short": "the caption is too short",
    "caption_too_long": "the caption is too long",
    "caption_file_name": "the caption is a file's name",
    "caption_boilerplate": "the caption says nothing of the picture",
    "taken_down": "taken down: a tombstone names it",
    "duplicate_url": "the address came before",
    "duplicate_exact": "the same bytes as another sample",
    "duplicate_perceptual": "the same picture as another sample, encoded anew",
    "duplicate_text": "too many samples have a caption that says nearly the same",
    "test_image": "shows a picture that models are measured on",
    "duplicate_semantic": "a picture of the same thing as another sample's",
}


def plain(text: Any, limit: int = CAPTION_CHARACTERS) -> str:
    """Return text from the web on one line, at most `limit` characters, without control characters.

    Markup stays as it is: the templates escape it.
    """
    start = str(text if text is not None else "")[: 4 * limit]
    seen = (" " if char.isspace() or unicodedata.category(char) == "Cc" else char for char in start)
    kept = "".join(char for char in seen if char in _JOINERS or unicodedata.category(char) not in _UNSEEN)
    words = " ".join(kept.split())
    return words if len(words) <= limit else words[: limit - 1].rstrip() + "…"


def address(url: Any) -> tuple[str, str]:
    """Return (host, rest) of a URL for showing; anything but an http URL is all rest."""
    text = plain(url, ADDRESS_CHARACTERS)
    try:
        split = urlsplit(text)
        host = split.netloc if split.scheme in ("http", "https") else ""
    except ValueError:
        return "", text
    if not host:
        return "", text
    return host, text.split(host, 1)[1] or "/"


def breakable(text: str) -> Markup:
    """Return an address as escaped markup that may break after its punctuation rather than anywhere."""
    return Markup("<wbr>").join(re.split(r"(?<=[/?&=_.-])", text))


def reason(name: str) -> str:
    """Return a reason in words."""
    return REASONS.get(name, name.replace("_", " "))


def label(name: str) -> str:
    """Return an identifier as a title: `held_out_style` is `Held out style`."""
    words = plain(name, NAME_CHARACTERS).replace("_", " ").strip()
    return words[:1].upper() + words[1:]


def number(value: float) -> str:
    """Return a count or a quantity with three figures that matter: `1,234`, `0.0716`, `2.3e-05`."""
    if isinstance(value, int) or value == int(value):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def percent(share: float) -> str:
    """Return a share as `12.3%`: a second decimal below one percent, none for whole ones."""
    if abs(100 * share - round(100 * share)) < 1e-9:
        return f"{share:.0%}"
    return f"{share:.2%}" if 0 < share < 0.01 else f"{share:.1%}"


def duration(seconds: float) -> str:
    """Return a time span in its two largest units: `2 h 5 min`, `3 min 20 s`, `8.2 s`."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if rest else f"{minutes} min"


def size(count: float) -> str:
    """Return a number of bytes as `2.3 GB`, in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
