"""The corpus on disk: folder and file names, key arithmetic, the sidecar's schema, statuses and reasons."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

import pyarrow as pa

from infra.errors import UserError

FORMAT_VERSION = 1
"""Version of everything described here; a reader refuses a corpus of a higher one."""

PLAN, RAW, DEDUP, FINAL = "plan", "raw", "dedup", "final"
MANIFEST = "corpus.json"
INDEX = "index.parquet"
REMOVED = "removed.parquet"
THRESHOLDS = "thresholds.parquet"
"""Pairs at dedup's thresholds, for a person to look at."""
STATS_SUFFIX = "_stats.json"
SIGNATURES = "signatures"
RETRY = "retry"
"""Folder in raw/ with the parts of rows that were tried again."""
EARLIER_STATUS, EARLIER_REASON = "earlier_status", "earlier_reason"
"""Columns of such a part: what the row ended as before."""
EMBEDDED = "embeddings.json"
"""Beside embeddings: of what they are, and by which model."""
TOMBSTONES = "tombstones"
"""Folder in a corpus that says what was taken down."""
ROW, SOURCE_KEY = "row", "source_key"
"""Columns that the plan and repack add to the input's own."""
KEY_ROW_DIGITS = 4
MAX_ROWS_PER_SHARD = 10**KEY_ROW_DIGITS


class Status(StrEnum):
    """What became of a row; the first three are img2dataset's own words."""

    SUCCESS = "success"
    FAILED_TO_DOWNLOAD = "failed_to_download"
    FAILED_TO_RESIZE = "failed_to_resize"
    FILTERED = "filtered"


class Reason(StrEnum):
    """Why a row is not a sample (empty for one that is)."""

    NONE = ""
    # the network
    BAD_URL = "bad_url"
    BLOCKED_ADDRESS = "blocked_address"
    DNS = "dns"
    CONNECT = "connect"
    TLS = "tls"
    TIMEOUT = "timeout"
    TOO_SLOW = "too_slow"
    HTTP_STATUS = "http_status"
    TOO_MANY_REDIRECTS = "too_many_redirects"
    TOO_LARGE = "too_large"
    TRUNCATED_BODY = "truncated_body"
    CONNECTION_RESET = "connection_reset"
    NOT_ATTEMPTED = "not_attempted"
    CRAWLER_ERROR = "crawler_error"
    # the rights holder's word
    ROBOTS_TXT = "robots_txt"
    OPT_OUT = "opt_out"
    # the picture
    NOT_AN_IMAGE = "not_an_image"
    CONTENT_ENCODING = "content_encoding"
    DECODE_ERROR = "decode_error"
    DECODER_CRASH = "decoder_crash"
    DECODE_TIMEOUT = "decode_timeout"
    BAD_BOXES = "bad_boxes"
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_SMALL = "too_small"
    TOO_LARGE_AREA = "too_large_area"
    ASPECT = "aspect"
    # the caption, and the plan
    CAPTION_EMPTY = "caption_empty"
    CAPTION_TOO_SHORT = "caption_too_short"
    CAPTION_TOO_LONG = "caption_too_long"
    CAPTION_FILE_NAME = "caption_file_name"
    CAPTION_BOILERPLATE = "caption_boilerplate"
    DUPLICATE_URL = "duplicate_url"
    # dedup
    DUPLICATE_EXACT = "duplicate_exact"
    DUPLICATE_PERCEPTUAL = "duplicate_perceptual"
    DUPLICATE_SEMANTIC = "duplicate_semantic"
    DUPLICATE_TEXT = "duplicate_text"
    TEST_IMAGE = "test_image"
    # a take-down
    TAKEN_DOWN = "taken_down"


SIDECAR = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("url", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string()),  # the failure in words: exception, header, robots line
        pa.field("http_status", pa.int16()),
        pa.field("final_url", pa.string()),
        pa.field("content_type", pa.string()),
        pa.field("bytes", pa.int64()),  # of the body, after content decoding
        pa.field("attempts", pa.int16()),
        pa.field("transient", pa.bool_()),  # a failure that a later try may mend; null for what did not fail
        pa.field("fetched_at", pa.timestamp("ms", tz="UTC")),
        pa.field("sha256", pa.string()),  # hex, of the body
        pa.field("phash", pa.string()),  # PDQ, 64 hex characters
        pa.field("phash_quality", pa.int16()),  # PDQ's own, 0 to 100; low means a flat picture
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("original_width", pa.int32()),
        pa.field("original_height", pa.int32()),
        pa.field("opt_out", pa.string()),  # evidence: the header or robots.txt rule, word for word
        pa.field("member", pa.string()),  # name of the image's tar member
        pa.field("offset", pa.int64()),  # of the sample's first header in the tar
        pa.field("size", pa.int64()),  # of the whole sample in the tar, headers and padding included
        pa.field("image_offset", pa.int64()),  # of the image's bytes in the tar
        pa.field("image_bytes", pa.int64()),
    ]
)
"""One row for each input row. Pass-through columns of the input follow under their own names."""


def sidecar_schema(passthrough: pa.Schema | None = None) -> pa.Schema:
    """Return the sidecar schema, the input's pass-through columns at its end. Raises UserError on a clash."""
    schema = SIDECAR
    for field in passthrough or ():
        if field.name in SIDECAR.names:
            raise _taken(field.name)
        schema = schema.append(field)
    return schema


def check_passthrough(names: Iterable[str], also: Iterable[str] = ()) -> None:
    """Raise UserError if a column of the input has the name of one that a sidecar, or `also`, has of its own."""
    ours = {*SIDECAR.names, ROW, SOURCE_KEY, *also}
    for name in names:
        if name in ours:
            raise _taken(name)


def _taken(name: str) -> UserError:
    return UserError(
        f"column '{name}' of the input has a name that the corpus needs for itself; rename it in the input, "
        "or name the columns to carry along, without it, with --columns"
    )


def part_name(number: int) -> str:
    """Return the name of plan part `number`: `part-00012.parquet`."""
    return f"part-{number:05d}.parquet"


def part_number(name: str) -> int:
    """Return the number in a plan part's name. Raises ValueError for another name."""
    if not (name.startswith("part-") and name.endswith(".parquet")):
        raise ValueError(f"{name}: not the name of a plan part")
    return int(name.removeprefix("part-").removesuffix(".parquet"))


def shard_name(number: int) -> str:
    """Return a shard's name, without a suffix: `00012`; from 100,000 on it has more digits."""
    return f"{number:05d}"


def by_number(name: str) -> tuple[bool, int, str]:
    """Return what shard names and keys are sorted by: the number, and behind all numbers other names as text.

    `100000` comes after `99999`, where text would have it before.
    """
    is_number = name.isascii() and name.isdigit()
    return not is_number, int(name) if is_number else 0, name


def sample_key(shard: int, row: int) -> str:
    """Return the key of row `row` of shard `shard`: its name, then the row in four digits, as img2dataset.

    Raises:
        ValueError: the row does not fit in its digits.
    """
    if not 0 <= row < MAX_ROWS_PER_SHARD:
        raise ValueError(f"row {row}: a shard holds at most {MAX_ROWS_PER_SHARD} rows")
    return f"{shard_name(shard)}{row:0{KEY_ROW_DIGITS}d}"


def key_address(key: str) -> tuple[int, int]:
    """Return (shard number, row) of a key. Raises ValueError for a key of another shape."""
    if not key.isdigit() or len(key) <= KEY_ROW_DIGITS:
        raise ValueError(f"{key!r}: not a key of this corpus format")
    return int(key[:-KEY_ROW_DIGITS]), int(key[-KEY_ROW_DIGITS:])
