"""What img2dataset says of a row, in the words of the sidecar. Pure."""

from __future__ import annotations

import re

from ingest.fetch import TRANSIENT_STATUSES
from shards.layout import Reason, Status

_SIZES = {
    "image too small": Reason.TOO_SMALL,
    "image area too large": Reason.TOO_LARGE_AREA,
    "aspect ratio too large": Reason.ASPECT,
}
_OPTED_OUT = "Use of image disallowed by X-Robots-Tag directive"
_FAILURES = tuple(
    (re.compile(words, re.IGNORECASE), reason, transient)
    for words, reason, transient in (
        # of `ingest.opener`
        (r"not a public address", Reason.BLOCKED_ADDRESS, False),
        (r"shard's deadline|given up", Reason.NOT_ATTEMPTED, True),
        # of urllib; an endless redirect is an HTTP error to it
        (r"redirect error|more than \d+ redirects", Reason.TOO_MANY_REDIRECTS, False),
        (r"HTTP Error \d{3}", Reason.HTTP_STATUS, False),
        (r"timed? ?out", Reason.TIMEOUT, True),
        (r"temporary failure in name resolution", Reason.DNS, True),
        (r"name or service|nodename|no address associated", Reason.DNS, False),
        (r"\bSSL\b|certificate", Reason.TLS, False),
        (r"IncompleteRead", Reason.TRUNCATED_BODY, True),
        (r"refused|unreachable|no route", Reason.CONNECT, True),
        (r"unknown url type|no host given|control characters|nonnumeric port|codec", Reason.BAD_URL, False),
    )
)
"""Words in a message, the reason they mean here, and whether another try may do better. The first that fits."""


def verdict(
    status: str, message: str | None, body: bytes | None = None, http_status: int | None = None
) -> tuple[Status, Reason, str | None, bool]:
    """Return (status, reason, detail, whether another try may do better) for one row.

    `status` and `message` are the peer's. `body` tells what is no picture from a damaged one, `http_status` which
    HTTP errors pass.
    """
    if status == "success":
        return Status.SUCCESS, Reason.NONE, None, False
    detail = " ".join((message or "").split())[:200]
    if status == "failed_to_resize":
        if detail in _SIZES:
            return Status.FILTERED, _SIZES[detail], detail, False
        return Status.FAILED_TO_RESIZE, _undecoded(detail, body), detail, False
    if detail == _OPTED_OUT:
        return Status.FILTERED, Reason.OPT_OUT, detail, False
    for words, reason, transient in _FAILURES:
        if words.search(detail):
            transient = transient or (reason == Reason.HTTP_STATUS and http_status in TRANSIENT_STATUSES)
            return Status.FAILED_TO_DOWNLOAD, reason, detail, transient
    return Status.FAILED_TO_DOWNLOAD, Reason.CONNECTION_RESET, detail, True


def _undecoded(detail: str, body: bytes | None) -> Reason:
    if "CV_IO_MAX_IMAGE" in detail:
        return Reason.TOO_MANY_PIXELS
    is_text = body is not None and body.lstrip()[:1] in (b"", b"<")
    return Reason.NOT_AN_IMAGE if is_text else Reason.DECODE_ERROR
