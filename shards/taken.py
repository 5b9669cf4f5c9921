"""Which samples of a folder were taken down since a stream opened it: what it holds of them it must not give out."""

from __future__ import annotations

import time

from infra.logs import log
from infra.storage import Folder, storage_failures
from shards.index import Index
from shards.layout import FINAL, RAW, TOMBSTONES
from shards.tombstones import DONE_SUFFIX

LOOK_S, AGAIN_S = 10.0, 60.0
"""How long an object store is asked for the tombstones, and how long after a failure it is asked again, in seconds."""


class TakenSince:
    """The numbers of samples that were taken down since; it looks anew when it is told that an epoch begins.

    What a stream reads it may have read before: in blocks on their way, in a cache on disk, whose files are named by
    the digests of the index that it opened. Outside a corpus there is nothing to look at.
    """

    def __init__(self, folder: Folder) -> None:
        """Begin to look. Call it before the index is read: what is in the index is then known, or looked at."""
        above, _, self.stage = folder.url.rpartition("/")
        self._above = above if self.stage in (RAW, FINAL) and above else None
        self.numbers: frozenset[int] = frozenset()
        self._epoch: int | None = None
        self._not_before = 0.0
        self._seen: frozenset[str] = frozenset()
        self._seen = frozenset(self._done() or ())

    def at_epoch(self, epoch: int, index: Index) -> None:
        """Look for what was taken down, if this epoch is another than when that was last seen.

        A store that is away holds nobody up: it is asked again at a later call.
        """
        if epoch == self._epoch or time.monotonic() < self._not_before:
            return
        done = self._done()
        if done is None:
            self._not_before = time.monotonic() + AGAIN_S
            return
        self._epoch = epoch
        new = frozenset(done) - self._seen
        if not new or self._above is None:
            return
        first = {shard.name: shard.first_sample for shard in index.shards}
        found = set(self.numbers)
        for name in sorted(new):
            places = (Folder(self._above) / TOMBSTONES).read_json(name)["places"].get(self.stage, {})
            found.update(first[shard] + place for shard, all_of in places.items() for place in all_of if shard in first)
        self.numbers, self._seen = frozenset(found), self._seen | new

    def _done(self) -> list[str] | None:
        """Return the names of the removals that are done; None where they cannot be had now."""
        if self._above is None:
            return []
        try:
            return (Folder(self._above) / TOMBSTONES).names(DONE_SUFFIX, LOOK_S)
        except storage_failures() as error:
            log.warning("%s/%s: cannot be looked at (%s)", self._above, TOMBSTONES, " ".join(str(error).split()))
            return None
