"""What the sidecar says of a row, from what the network and the decoder made of it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from ingest.crawl import Fetched
from ingest.urls import MAX_URL_CHARACTERS
from shards.barred import Entry
from shards.layout import Reason, Status
from shards.scrub import scrubbed
from shards.tombstones import tombstone_name

MAX_CHARACTERS = 2000
"""What is kept of a header; a server may send many times as much."""


def row_without_picture(row: dict[str, Any], fetched: Fetched) -> dict[str, Any]:
    """Return an input row with the facts of its download; those of a picture are laid over them."""
    return row | {
        "status": fetched.status.value,
        "reason": fetched.reason.value,
        "detail": storable(fetched.detail),
        "http_status": fetched.http_status,
        "final_url": storable(fetched.final_url, MAX_URL_CHARACTERS),
        "content_type": storable(fetched.content_type),
        "attempts": fetched.attempts,
        "transient": fetched.transient if fetched.status == Status.FAILED_TO_DOWNLOAD else None,
        "fetched_at": datetime.now(UTC) if fetched.attempts > 0 else None,
        "opt_out": storable(fetched.opt_out),
        "original_width": fetched.original_width,
        "original_height": fetched.original_height,
    }


def row_taken_down(row: dict[str, Any], fetched: Fetched, entry: Entry) -> dict[str, Any]:
    """Return an input row that a take-down bars: it says so, and keeps nothing of what it was."""
    told = {
        "status": Status.FILTERED.value, "reason": Reason.TAKEN_DOWN.value,
        "detail": tombstone_name(entry.source),
    }  # fmt: skip
    return scrubbed(row_without_picture(row, fetched)) | told


def row_with_picture(row: dict[str, Any], fetched: Fetched, facts: dict[str, Any]) -> dict[str, Any]:
    """Return an input row with the facts of its download and, over them, the decoder's."""
    whole = row_without_picture(row, fetched) | facts
    if fetched.still_encoded is not None and whole["reason"] == Reason.NOT_AN_IMAGE:
        whole["reason"] = Reason.CONTENT_ENCODING.value
        whole["detail"] = storable(f"Content-Encoding: {fetched.still_encoded}; {whole['detail']}")
    return whole


def storable(text: str | None, most: int = MAX_CHARACTERS) -> str | None:
    """Return text from the web as Parquet takes it: at most `most` characters, each of them one of Unicode's.

    Bytes that were no UTF-8 come as lone surrogates; they are written out, as `\\\\udce9`.
    """
    if text is None or (len(text) <= most and text.isascii()):
        return text
    return text[:most].encode("utf-8", "backslashreplace").decode()[:most]
