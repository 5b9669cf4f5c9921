"""The corpus format: layout, writer, index, order, stream, repack and verify."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shards.access import Samples


def open(folder: str | os.PathLike[str], *, decode: bool = False) -> Samples:
    """Open a shard folder for random access: `shards.open(FOLDER)[7]`, or by key; one ranged read each.

    Raises:
        UserError: no shards are there, or the index is of another version.
    """
    from shards.access import Samples  # the format's constants come without numpy and parquet

    return Samples(os.fspath(folder), decode=decode)
