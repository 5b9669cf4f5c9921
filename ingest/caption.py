"""Text filters: which captions say something about their picture."""

from __future__ import annotations

import re

from ingest.config import CaptionConfig
from shards.layout import Reason

_EXTENSION = re.compile(
    r"\.(jpe?g|jfif|png|gif|webp|avif|bmp|tiff?|svg|heic|heif|ico|psd|raw|cr2|nef|pdf|html?|php|aspx?)"
    r"([?#]\S*)?$",
    re.IGNORECASE,
)
_NUMBERED = re.compile(
    r"(img|image|images|imagen|photo|foto|pic|picture|dsc[nf]?|dscpdc|pxl|wp|mvi|gopr|cimg|kimg|scan|"
    r"screen ?shot|screenshot|whatsapp image|untitled|unnamed|download|file|slide|thumb|thumbnail|capture)"
    r"[\s_#()\-.:]*\d[\d\s_()\-.:xatpm]*(edit|edited|copy|scaled|large|small|final)?",
    re.IGNORECASE,
)
_CODE = re.compile(
    r"[0-9a-f]{16,}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[\d_\-.:x]{6,}|_?[A-Z]{2,5}\d?_?\d{4,}",
)
_WORDS_WITHOUT_LETTERS = re.compile(r"[\W\d_]*")
_BOILERPLATE = re.compile(
    r"""(
      (the\ )?(an?\ )?(image|photo|picture|pic|img|thumbnail|thumb|logo|icon|avatar|banner|spacer|blank|placeholder|
         untitled|unnamed|default|null|none|undefined|n/?a|no\ alt|alt(\ text)?|loading|advertisement|ad|caption)s?
      | (default|featured|main|product|profile|placeholder|header|hero|cover|post|article|user|related|sample)
         \ (image|photo|picture|avatar|thumbnail|logo|icon)s?
      | (click|tap)\ (here|(here\ |image\ |photo\ |picture\ |on\ \w+\ )?(to|for)\ .*)
      | (no|missing)\ (image|photo|picture|thumbnail|caption|description|alt(\ text)?)(\ (available|found|yet))?
      | (image|photo|picture|caption)\ (not\ (found|available)|unavailable|missing|coming\ soon|loading)
      | (your|company|site|website|add|insert)\ (image|photo|picture|logo|caption|alt\ text)(\ here)?
      | (image|photo|picture)\ may\ contain.*
      | (enlarge|zoom|view)\ (this\ )?(image|photo|picture|larger(\ image)?|full\ size)
      | (share|follow\ us|like|pin)( \ this)?\ (on|to|it|with)\ .*
      | (photo|image|picture)\ (by|credit|courtesy|source)\ .*
      | (copyright|©|\(c\)|all\ rights\ reserved).*
      | lorem\ ipsum.*
      | (read|learn|see|view)\ more.*
      | subscribe.* | sign\ (up|in).* | buy\ now.* | add\ to\ (cart|wishlist).*
    )""",
    re.IGNORECASE | re.VERBOSE,
)


def caption_reason(caption: str | None, config: CaptionConfig) -> Reason:
    """Return why this caption is not worth a download, `Reason.NONE` if it is. Lengths are in characters."""
    text = " ".join(caption.split()) if caption else ""
    if not text:
        return Reason.CAPTION_EMPTY if config.min_characters else Reason.NONE
    if len(text) < config.min_characters:
        return Reason.CAPTION_TOO_SHORT
    if len(text) > config.max_characters:
        return Reason.CAPTION_TOO_LONG
    if config.file_names and is_file_name(text):
        return Reason.CAPTION_FILE_NAME
    if config.boilerplate and is_boilerplate(text):
        return Reason.CAPTION_BOILERPLATE
    return Reason.NONE


def is_file_name(text: str) -> bool:
    """Tell whether a caption is what a camera, a phone or a disk called the file."""
    return bool(
        (_EXTENSION.search(text) and len(text.split()) <= 8) or _NUMBERED.fullmatch(text) or _CODE.fullmatch(text)
    )


def is_boilerplate(text: str) -> bool:
    """Tell whether a caption is a page's furniture: the same words under any picture."""
    bare = text.strip(" .!?:;,-–—*[](){}<>\"'…|")
    return _WORDS_WITHOUT_LETTERS.fullmatch(text) is not None or _BOILERPLATE.fullmatch(bare) is not None
