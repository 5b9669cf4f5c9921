"""The list of what is to be taken out: one thing a line, its kind before it."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

from infra.errors import UserError
from infra.storage import Folder
from shards.barred import ANY_BELOW, MAX_DISTANCE, Entry, Kind
from shards.layout import key_address
from shards.urls import canonical, digest_of, host_of

KEY_DIGITS = 18
"""Most digits of a key: more are no number of a shard and a row that fits 64 bits."""
LINES = "url URL, host HOST, key KEY, final KEY, sha256 DIGEST, pdq HASH DISTANCE"
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")


class MalformedLineError(ValueError):
    """A line that is none; the message says how to mend it."""


def read_list(where: str) -> list[Entry]:
    """Return the entries of a list, each once, in its order; any fsspec URL, UTF-8. Lines end as `open` has it.

    Empty lines and what follows a `#` at a line's start or after white space are passed over.

    Raises:
        UserError: no such file, no entry in it, or malformed lines, each of which is named.
    """
    parent, slash, name = where.rpartition("/")
    try:
        text = Folder(parent or slash or ".").read(name).decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{where}: no such list; give a file with lines such as {LINES}") from None
    except IsADirectoryError:
        raise UserError(f"{where}: a folder, no list; give a file with lines such as {LINES}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: no text in UTF-8 (byte {error.start}); save the list as UTF-8") from None
    entries, wrong = parse(list(io.StringIO(text, newline=None)))
    if wrong:
        raise UserError(f"{where}: {len(wrong)} malformed lines, nothing was done: {'; '.join(wrong)}")
    if not entries:
        raise UserError(f"{where}: holds no entry; give lines such as {LINES}")
    return entries


def parse(lines: list[str]) -> tuple[list[Entry], list[str]]:
    """Return the entries of a list's lines, and of each malformed one what is wrong with it and how to mend it."""
    entries: dict[Entry, None] = {}
    wrong = []
    for number, line in enumerate(lines, 1):
        words = re.sub(r"(^|\s)#.*", "", line).split()
        if not words:
            continue
        try:
            entries[_entry(words)] = None
        except MalformedLineError as error:
            wrong.append(f"line {number}: {error}")
    return list(entries), wrong


def _entry(words: list[str]) -> Entry:
    kind, values = words[0], words[1:]
    if kind not in list(Kind):
        raise MalformedLineError(f"{_short(kind)} is no kind of entry; begin with {LINES}")
    wanted = 2 if kind == Kind.PDQ else 1
    if len(values) != wanted:
        need = "a hash and a distance" if kind == Kind.PDQ else "one value (a space in a URL is %20)"
        raise MalformedLineError(f"{kind} with {len(values)} values; give {need}")
    value, distance = _VALUES[Kind(kind)](values)
    return Entry(Kind(kind), value, distance, " ".join(words))


def _url(values: list[str]) -> tuple[str, int]:
    digest = digest_of(values[0])
    if digest is None or canonical(values[0]) is None:
        raise MalformedLineError(f"{_short(values[0])} is no http or https URL; write it whole, https://host/path")
    return digest, 0


def _host(values: list[str]) -> tuple[str, int]:
    below = ANY_BELOW if values[0].startswith(ANY_BELOW) else ""
    name = values[0].removeprefix(ANY_BELOW)
    host = host_of(f"http://{name}/") if not set(name) & set("/@?#*:[]") else None
    if host is None:
        raise MalformedLineError(
            f"{_short(values[0])} is no host; give its name alone, as example.org, or *.example.org with all below it"
        )
    return below + host, 0


def _key(values: list[str]) -> tuple[str, int]:
    key = values[0]
    try:
        key_address(key)
        if not key.isascii() or len(key) > KEY_DIGITS:
            raise ValueError
    except ValueError:
        raise MalformedLineError(
            f"{_short(key)} is no key; give the digits of a sample's `key`, as 000120034"
        ) from None
    return key, 0


def _sha256(values: list[str]) -> tuple[str, int]:
    if not _DIGEST.fullmatch(values[0]):
        raise MalformedLineError(f"{_short(values[0])} is no SHA-256; give the 64 hex digits of a body's")
    return values[0].lower(), 0


def _pdq(values: list[str]) -> tuple[str, int]:
    if not _DIGEST.fullmatch(values[0]):
        raise MalformedLineError(f"{_short(values[0])} is no PDQ hash; give its 64 hex digits")
    if not values[1].isascii() or not values[1].isdigit() or int(values[1]) > MAX_DISTANCE:
        raise MalformedLineError(f"distance {_short(values[1])}; give a whole number of bits, 0 to {MAX_DISTANCE}")
    return values[0].lower(), int(values[1])


_VALUES: dict[Kind, Callable[[list[str]], tuple[str, int]]] = {
    Kind.URL: _url, Kind.HOST: _host, Kind.KEY: _key, Kind.FINAL: _key, Kind.SHA256: _sha256, Kind.PDQ: _pdq,
}  # fmt: skip


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:79] + "…")
