"""What the sidecar says of a row, from what the network made of it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from ingest.crawl import Fetched
from shards.layout import Status


def row_without_picture(row: dict[str, Any], fetched: Fetched) -> dict[str, Any]:
    """Return an input row with the facts of its download; those of a picture are laid over them."""
    return row | {
        "status": fetched.status.value,
        "reason": fetched.reason.value,
        "detail": fetched.detail,
        "http_status": fetched.http_status,
        "final_url": fetched.final_url,
        "content_type": fetched.content_type,
        "attempts": fetched.attempts,
        "transient": fetched.transient if fetched.status == Status.FAILED_TO_DOWNLOAD else None,
        "fetched_at": datetime.now(UTC) if fetched.attempts > 0 else None,
        "opt_out": fetched.opt_out,
        "original_width": fetched.original_width,
        "original_height": fetched.original_height,
    }
