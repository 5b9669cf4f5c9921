"""How a folder is read: with how much patience, and through which cache on a local disk."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

from infra.errors import UserError
from infra.storage import Folder
from shards.cache import CACHE_BYTES, DiskCache
from shards.index import Index
from shards.kept import KeepList
from shards.reads import PATIENCE_S, READ_TIMEOUT_S, Reader


@dataclass(frozen=True)
class Reading:
    """Options of `ShardStream` that its readers share.

    Raises:
        UserError: the cache's folder is not on a local disk, or has no name.
    """

    patience_s: float = PATIENCE_S
    timeout_s: float = READ_TIMEOUT_S
    cache_folder: str | os.PathLike[str] | None = None
    cache_bytes: int = CACHE_BYTES
    opened_s: float = field(default_factory=time.time)
    """Since when, in seconds since 1970: what is used in the cache from then on stays."""

    def __post_init__(self) -> None:
        if self.cache_folder is not None and not os.fspath(self.cache_folder):
            raise UserError("cache_folder: '' names no folder; give one on a local disk, or None for no cache")
        if self.cache_folder is not None and "://" in os.fspath(self.cache_folder):
            raise UserError(f"cache_folder: {os.fspath(self.cache_folder)}: give a folder on a local disk")

    def reader(self, folder: Folder, index: Index, block_samples: int, kept: KeepList | None) -> Reader:
        """Return a reader of a folder's samples, or of those kept, with connections of its own."""
        cache = None
        if self.cache_folder is not None:
            cache = DiskCache(self.cache_folder, self.cache_bytes, self.opened_s)
        return Reader(
            Folder(folder.url), index, self.patience_s, timeout_s=self.timeout_s, cache=cache,
            block_samples=block_samples, kept=kept,
        )  # fmt: skip
