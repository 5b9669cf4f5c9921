"""Deterministic ustar members: the same names and bytes give the same archive, to the byte."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass

BLOCK_BYTES = 512
END = bytes(2 * BLOCK_BYTES)
"""What closes an archive: two empty blocks."""


def header(name: str, size: int) -> bytes:
    """Return the 512-byte ustar header of a regular file: uid, gid and mtime 0, mode 0644.

    Raises:
        ValueError: the name is too long for one header, or would leave the folder it is unpacked in.
    """
    if not name or name.startswith("/") or "\\" in name or ".." in name.split("/"):
        raise ValueError(f"{name!r}: not a member name that stays in its folder")
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    block = info.tobuf(format=tarfile.USTAR_FORMAT, encoding="utf-8", errors="strict")
    if len(block) != BLOCK_BYTES:
        raise ValueError(f"{name!r}: too long for a tar header")
    return block


def padded(size: int) -> int:
    """Return `size` rounded up to whole blocks, in bytes."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


@dataclass(frozen=True)
class Member:
    """One member in an archive's bytes: `name`, and where its content lies, `[start, start + size)`."""

    name: str
    start: int
    size: int

    @property
    def end(self) -> int:
        """Offset of the block after the content."""
        return self.start + padded(self.size)


def members(data: bytes | memoryview) -> list[Member]:
    """Return the members in a run of whole ustar members (an archive, or a range that starts at a header).

    Raises:
        ValueError: a header is damaged, is not of a regular file, has a name that leaves its folder, or the
            data end before a member does. The message says at which byte.
    """
    found: list[Member] = []
    view = memoryview(data)
    at = 0
    while at + BLOCK_BYTES <= len(view):
        block = bytes(view[at : at + BLOCK_BYTES])
        if block[0] == 0 and not any(block):
            break
        name, size = _parse(block, at)
        start = at + BLOCK_BYTES
        if start + size > len(view):
            raise ValueError(f"byte {at}: member {name!r} is cut short")
        found.append(Member(name, start, size))
        at = start + padded(size)
    else:
        if at < len(view):
            raise ValueError(f"byte {at}: {len(view) - at} bytes that are no member")
    return found


def _parse(block: bytes, at: int) -> tuple[str, int]:
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        raise ValueError(f"byte {at}: damaged tar header ({error})") from None
    if not info.isreg():
        raise ValueError(f"byte {at}: {info.name!r} is not a regular file")
    if info.name.startswith("/") or ".." in info.name.split("/") or "\\" in info.name:
        raise ValueError(f"byte {at}: the name {info.name!r} leaves its folder")
    return info.name, info.size
