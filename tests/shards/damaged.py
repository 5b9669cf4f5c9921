"""Folders with damage at places that a test knows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from infra.storage import Folder
from shards import index


def flip(folder: Folder, name: str, at: int) -> None:
    """Turn over the bits of one byte of a file."""
    path = Path(folder.path(name))
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


def copy_with_holes(folder: Folder, to: Path, bad: Iterable[int], *, at: int = 5) -> Folder:
    """Copy a folder and damage the samples of these numbers: by default in a tar header, at 512 in the picture."""
    there = Folder(to)
    for name in folder.names():
        there.write(name, folder.read(name))
    entries = index.load(there)
    for number in bad:
        shard = entries.shard_of(number)
        row = number - entries.shards[shard].first_sample
        ends = entries.ends(shard)
        flip(there, entries.shards[shard].tar, (int(ends[row - 1]) if row else 0) + at)
    return there
