"""Tar members: written deterministically as ustar, read in every dialect that webdataset tools write."""

from __future__ import annotations

import mmap
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple

BLOCK_BYTES = 512
END = bytes(2 * BLOCK_BYTES)
"""What closes an archive: two empty blocks."""
LARGEST_EXTENDED_HEADER_BYTES = 1 << 20
LARGEST_TAR_BYTES = 1 << 41
"""What the index can address; a member that claims more is a lie or no member of ours."""

_REGULAR, _PAX, _LONG_NAME, _SPARSE = (b"0", b"\0", b"7"), b"x", b"L", b"S"
_LEAST_SEEK_BYTES = 4096
_WITHOUT_CONTENT = b"123456"
"""Links, devices, folders, pipes: nothing follows their header, whatever size it gives."""
_ADLER = 65521
_PLAIN = struct.Struct("100s 24x 11s c 12x 6s 3s 100x 6s 82x B 166x").unpack_from
_DIGIT_SUMS = bytes(sum(map(int, f"{number:o}")) for number in range(1 << 16))
_PLAIN_SUM = 6 * ord("0") + ord(" ") - 8 * ord(" ") + 1
"""From a header's told sum and its digits' sum to Adler-32's low half: the sum's own eight bytes count as blanks."""
_NAME_BYTES, _OCTAL_LIMIT = 100, 8**11
_MODE_AND_OWNER = b"0000644\x000000000\x000000000\0"
_AFTER_TIME = b" " * 8 + b"0".ljust(101, b"\0") + b"ustar\x0000" + bytes(64 + 183)
_PAX_RECORD = re.compile(rb"(\d{1,7}) ([^=]+)=")


def header(name: str, size: int) -> bytes:
    """Return the 512-byte ustar header of a regular file: uid, gid and mtime 0, mode 0644.

    Raises:
        ValueError: the name is too long for one header, or would leave the folder it is unpacked in.
    """
    if not name or _climbs_out(name):
        raise ValueError(f"{name!r}: not a member name that stays in its folder")
    encoded = name.encode()
    if len(encoded) <= _NAME_BYTES and size < _OCTAL_LIMIT:
        block = encoded.ljust(_NAME_BYTES, b"\0") + _MODE_AND_OWNER + b"%011o\0%011o\0" % (size, 0) + _AFTER_TIME
        # The sum is taken with eight blanks in its own place, where `_AFTER_TIME` has them.
        return block[:148] + b"%06o\0" % sum(block) + block[155:]
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    block = info.tobuf(format=tarfile.USTAR_FORMAT, encoding="utf-8", errors="strict")
    if len(block) != BLOCK_BYTES:
        raise ValueError(f"{name!r}: too long for a tar header")
    return block


def padded(size: int) -> int:
    """Return `size` rounded up to whole blocks, in bytes."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


class Member(NamedTuple):
    """One member in an archive's bytes: `name`, and where its content lies, `[start, start + size)`."""

    name: str
    start: int
    size: int

    @property
    def end(self) -> int:
        """Offset of the block after the content."""
        return self.start + padded(self.size)


def plain(data: bytes | mmap.mmap, at: int) -> tuple[bytes, int] | None:
    """Return name (padded with NUL) and content size from the header at byte `at`, if `header` would write it so.

    None for every other header, the damaged ones too: `members` knows them, and says what is wrong. It is there since
    a stream reads three headers a sample: this takes a sixth of the time.
    """
    if at + BLOCK_BYTES > len(data):
        return None
    name, digits, after, told, kind, magic, prefix = _PLAIN(data, at)
    if after != b"\0" or kind != b"\0 0" or magic != b"ustar\0" or prefix or not (digits.isdigit() and told.isdigit()):
        return None
    try:
        summed, size = int(told, 8), int(digits, 8)
    except ValueError:
        return None
    # As in `_kind_and_size`, where the sum's own digits count; a header's sum has no more than 16 bits.
    if zlib.adler32(data[at : at + BLOCK_BYTES]) & 0xFFFF != summed + _DIGIT_SUMS[summed & 0xFFFF] + _PLAIN_SUM:
        return None
    return name, size


def members(data: bytes) -> list[Member]:
    """Return the regular files in a run of whole members (an archive, or a range that starts at a header).

    Pax and GNU long names are followed; folders, links and devices are passed over.

    Raises:
        ValueError: a header is damaged, a name leaves its folder, a member is sparse, or the data end before a
            member does. The message says at which byte.
    """
    found: list[Member] = []
    following = _Following()
    at, length = 0, len(data)
    while at < length:
        block = data[at : at + BLOCK_BYTES]
        if len(block) < BLOCK_BYTES:
            raise ValueError(f"byte {at}: {len(block)} bytes that are no member")
        if block[0] == 0 and not any(block):
            break
        kind, size = _kind_and_size(block, at, following)
        start = at + BLOCK_BYTES
        if start + size > length:
            raise ValueError(f"byte {at}: member {_name(block)!r} is cut short")
        if kind in _REGULAR:
            found.append(following.regular(block, at, size))
        else:
            following.other(kind, data[start : start + size] if kind in b"xL" else b"", at)
        at = start + padded(size)
    return found


def scan(stream: IO[bytes], wanted: Callable[[str], bool] | None = None) -> Iterator[tuple[Member, bytes | None]]:
    """Yield the regular files of an archive from its stream, each with its content if its name is `wanted`.

    Other contents are seeked over.

    Raises:
        ValueError: as `members`, and when the archive ends without a closing block.
    """
    following = _Following()
    read, seek = stream.read, stream.seek
    at = 0
    while True:
        block = read(BLOCK_BYTES)
        if len(block) < BLOCK_BYTES:
            raise ValueError(f"byte {at}: the archive ends without its closing blocks")
        if block[0] == 0 and not any(block):
            return
        kind, size = _kind_and_size(block, at, following)
        if kind in _REGULAR:
            member = following.regular(block, at, size)
            content = read(size) if wanted is not None and wanted(member.name) else None
            if content is not None and len(content) < size:
                raise ValueError(f"byte {at}: member {member.name!r} is cut short")
            yield member, content
        else:
            content = read(size) if kind in b"xL" else None
            following.other(kind, content or b"", at)
        at += BLOCK_BYTES + padded(size)
        rest = padded(size) - (len(content) if content is not None else 0)
        if rest > _LEAST_SEEK_BYTES:
            seek(at)
        elif rest:
            read(rest)  # out of the stream's buffer, mostly: quicker than a seek


class _Following:
    """What an extended header says about the member after it."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.size: int | None = None

    def regular(self, block: bytes, at: int, size: int) -> Member:
        """Return the regular file that `block` is the header of."""
        name = _name(block) if self.name is None else self.name
        self.name = self.size = None
        if _climbs_out(name):
            raise ValueError(f"byte {at}: the name {name!r} leaves its folder")
        return Member(name, at + BLOCK_BYTES, size)

    def other(self, kind: bytes, content: bytes, at: int) -> None:
        """Note an extended header; pass over what is no file."""
        if kind == _LONG_NAME:
            self.name = _text(content.rstrip(b"\0"))
        elif kind == _PAX:
            self._note(content, at)
        elif kind == _SPARSE:
            raise ValueError(f"byte {at}: a sparse member, which is not read; pack it anew without holes")
        else:
            self.name = self.size = None

    def _note(self, content: bytes, header_at: int) -> None:
        at = 0
        while match := _PAX_RECORD.match(content, at):
            end = at + int(match[1])
            if end <= match.end() or content[end - 1 : end] != b"\n":
                break
            value = content[match.end() : end - 1]
            if match[2] == b"path":
                self.name = _text(value)
            elif match[2] == b"size":
                self.size = int(value) if value.isdigit() and len(value) <= 20 else LARGEST_TAR_BYTES + 1
            elif match[2].startswith(b"GNU.sparse."):
                raise ValueError(f"byte {header_at}: a sparse member, which is not read; pack it anew without holes")
            at = end
        if content[at:].strip(b"\0"):
            raise ValueError(f"byte {header_at}: damaged extended header (at its byte {at})")


def _kind_and_size(block: bytes, at: int, following: _Following) -> tuple[bytes, int]:
    """Return a header's type flag and its content's size, its checksum once checked."""
    try:
        field = block[148:156]
        # Adler-32's low half is one more than the sum of the bytes, and many times faster than adding here.
        summed = int(field.strip(b" \0") or b"-", 8) - 256 + sum(field) + 1
        if zlib.adler32(block) & 0xFFFF != summed % _ADLER:
            raise ValueError("wrong checksum")
        digits = block[124:136]
        # Base 256 is for sizes of 8 GiB and more.
        size = int.from_bytes(digits[1:], "big") if digits[0] == 0x80 else int(digits.strip(b" \0") or b"0", 8)
    except ValueError as error:
        raise ValueError(f"byte {at}: damaged tar header ({error})") from None
    kind = block[156:157]
    if kind in _REGULAR:
        if following.size is not None:
            size = following.size
    elif kind in _WITHOUT_CONTENT:
        size = 0
    elif kind in b"xL" and size > LARGEST_EXTENDED_HEADER_BYTES:
        raise ValueError(f"byte {at}: an extended header of {size} bytes")
    if not 0 <= size <= LARGEST_TAR_BYTES:
        raise ValueError(f"byte {at}: a member of {size} bytes; an archive has {LARGEST_TAR_BYTES} at most")
    return kind, size


def _name(block: bytes) -> str:
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    return _text(name)


def _text(name: bytes) -> str:
    """Return a name as text: UTF-8, else Latin-1, in which every byte is a character that can be printed and listed."""
    try:
        return name.decode()
    except UnicodeDecodeError:
        return name.decode("latin-1")


def _climbs_out(name: str) -> bool:
    return name.startswith("/") or "\\" in name or (".." in name and ".." in name.split("/"))
