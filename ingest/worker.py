"""One worker: an event loop for the network, processes that decode, a writer thread for each shard in hand."""

from __future__ import annotations

import asyncio
import functools
import queue
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import uvloop

from infra import metrics
from infra.cluster import end_actor
from infra.logs import log
from infra.storage import Folder
from ingest import part as parts
from ingest.config import IngestConfig
from ingest.crawl import Crawler, Errand, Fetched, Visit
from ingest.decoding import Decoders
from ingest.image import refusal_by_header
from ingest.part import Part
from ingest.reorder import RowOrder
from ingest.sidecar import row_taken_down, row_with_picture, row_without_picture
from ingest.tally import Tally
from shards import tombstones
from shards.barred import Entry
from shards.layout import RAW, Reason, Status, part_name, shard_name
from shards.writer import writing

LARGE_BYTES = 2**20
"""A body from this size on is judged by its header even when all that counts is the number of pixels."""
FILTERED_BYTES = 32 * 1024
"""The same, when small or long pictures are filtered as well."""


NEVER_S = 10 * 365 * 86400.0
"""The deadline of a shard that has none, in seconds."""


class AbandonedError(Exception):
    """The shard is given up since another part of its worker failed."""


class BrokenCrawlerError(Exception):
    """The crawler failed by a fault that is no row's, and makes no shard any more; the cause says how."""


@dataclass(frozen=True, slots=True)
class _Ended:
    """One row at its end, on its way to the shard's writer."""

    index: int
    row: dict[str, Any]
    picture: bytes | None
    fetched: Fetched


@dataclass
class _Shard:
    """One shard in hand: its part, the queue that its writer reads, and the bytes of it that wait."""

    part: Part
    held_bytes: int = 0
    is_over: bool = False
    ended: queue.SimpleQueue[_Ended | BaseException] = field(default_factory=queue.SimpleQueue)


class ShardWorker:
    """Makes shards out of plan parts. `run` may be called from several threads at once, for as many shards.

    All shards in hand share one crawler, so that the slow hosts at the end of one leave no gap. Pictures are
    decoded in processes of their own, so that none can take the worker with it; each shard has a thread that
    writes, since a store may make it wait.
    """

    def __init__(self, corpus: str, config: IngestConfig, workers: int = 1, number: int = 0) -> None:
        """`workers` is how many workers share the bounds that hold for the whole run, `number` which this is."""
        self._config = config
        self._corpus, self._raw = Folder(corpus), Folder(corpus) / RAW
        self._barred = tombstones.barred(self._corpus)
        self._hashes = config.image.phash
        self._decoders = Decoders(_hashing(config) if self._barred.has_pictures else config)
        self._writers = ThreadPoolExecutor(config.shards_at_once, "write")
        self._buffered = 0
        self._buffer_lock = threading.Lock()
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="network", daemon=True)
        self._thread.start()
        self._crawler = asyncio.run_coroutine_threadsafe(self._start(workers, number), self._loop).result()

    def run(self, part: int) -> dict[str, Any]:
        """Make the shard of plan part `part` and commit it; return the content of its `_stats.json`.

        A crawler that is broken ends the actor in which it runs: the part falls to the one in its place.

        Raises:
            RunError: the part is damaged, or the disk is full. No trace of the shard is left.
            BrokenCrawlerError: it is broken, and there is no actor to end.
        """
        shard = _Shard(parts.read(self._corpus, part))
        try:
            return asyncio.run_coroutine_threadsafe(self._make(shard), self._loop).result()
        except BrokenCrawlerError:
            log.exception("ingest: this worker's crawler is broken, at %s", part_name(part))
            end_actor()
            raise

    def close(self) -> None:
        """End all threads and connections."""
        asyncio.run_coroutine_threadsafe(self._crawler.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._decoders.close()
        self._writers.shutdown(cancel_futures=True)

    async def _start(self, workers: int, number: int) -> Crawler:
        image = self._config.image
        judge = functools.partial(refusal_by_header, config=image)
        filters = image.min_side > 1 or image.max_aspect is not None
        return Crawler(self._config.fetch, workers, judge, FILTERED_BYTES if filters else LARGE_BYTES, number)

    async def _make(self, shard: _Shard) -> dict[str, Any]:
        errand = Errand(
            functools.partial(self._fetched, shard),
            int(self._config.fetch.retry_budget * len(shard.part.rows)),
        )
        writing_it: asyncio.Future[Any] = asyncio.wrap_future(self._writers.submit(self._write, shard), loop=self._loop)
        for index, row in enumerate(shard.part.rows):
            earlier = shard.part.elsewhere.get(row["key"])
            barred = self._barred.row(row["key"], row["url"]) if earlier is None else None
            if barred is not None:
                self._refused(shard, index, Fetched(), barred)
            elif earlier is None:
                self._crawler.send(Visit(errand, index, row["url"], row["key"]))
            else:
                status, reason = Status(earlier[0]), Reason(earlier[1])
                self._fetched(shard, index, Fetched(None, status, reason, "tried again in another shard"))
        deadline = self._loop.call_later(self._config.shard_deadline_s or NEVER_S, self._cut, errand)
        try:
            await asyncio.wait((writing_it, self._crawler.broken), return_when=asyncio.FIRST_COMPLETED)
            if self._crawler.broken.done() and not writing_it.done():
                raise BrokenCrawlerError("the crawler is broken") from self._crawler.broken.exception()
            made: dict[str, Any] = await writing_it
            return made
        finally:
            deadline.cancel()
            errand.abandoned = True
            if not writing_it.done():
                shard.ended.put(AbandonedError())
                await asyncio.wait((writing_it,))
            self._let_go(shard)

    def _cut(self, errand: Errand) -> None:
        errand.cut(f"not done when the shard's deadline of {self._config.shard_deadline_s:g} s came")

    def _fetched(self, shard: _Shard, index: int, fetched: Fetched) -> None:
        """Take a result off the crawler: a body goes to the decoders, anything else is at its end."""
        row = shard.part.rows[index]
        if fetched.body is None:
            shard.ended.put(_Ended(index, row_without_picture(row, fetched), None, fetched))
            return
        barred = self._barred.url(fetched.final_url)
        if barred is not None:
            self._refused(shard, index, fetched, barred)
            return
        self._hold(shard, len(fetched.body))
        boxes = row[self._config.image.faces_col] if self._config.image.faces_col else None
        task = self._decoders.submit(fetched.body, boxes)
        task.add_done_callback(functools.partial(self._decoded, shard, index, fetched))

    def _refused(self, shard: _Shard, index: int, fetched: Fetched, entry: Entry) -> None:
        """End a row that a take-down bars."""
        shard.ended.put(_Ended(index, row_taken_down(shard.part.rows[index], fetched, entry), None, fetched))

    def _decoded(
        self,
        shard: _Shard,
        index: int,
        fetched: Fetched,
        task: Future[tuple[dict[str, Any], bytes | None]],
    ) -> None:
        """Take a picture off the decoders, to the shard's writer."""
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            shard.ended.put(error)
            return
        facts, picture = task.result()
        barred = self._barred.body(facts.get("sha256")) or self._barred.picture(facts.get("phash"))
        if barred is not None and picture is not None:
            self._hold(shard, -len(fetched.body or b""))
            self._refused(shard, index, fetched, barred)
            return
        if not self._hashes:
            facts |= {"phash": None, "phash_quality": None}
        row = row_with_picture(shard.part.rows[index], fetched, facts)
        self._hold(shard, (len(picture) if picture else 0) - len(fetched.body or b""))
        shard.ended.put(_Ended(index, row, picture, fetched))

    def _write(self, shard: _Shard) -> dict[str, Any]:
        extension = self._config.image.format
        order = RowOrder(self._config.buffer_bytes // 2, self._raw.url if self._raw.is_local else None)
        tally = Tally()
        more: dict[str, Any] = {}
        written: dict[str, Any] = {}
        try:
            with writing(self._raw, shard_name(shard.part.number), shard.part.schema, more) as writer:
                for _ in shard.part.rows:
                    ended = shard.ended.get()
                    if isinstance(ended, BaseException):
                        raise ended
                    self._hold(shard, -len(ended.picture) if ended.picture else 0)
                    tally.add(ended.row, ended.fetched)
                    order.add(ended.index, ended.row, ended.picture)
                    for row, picture in order.ready():
                        started = time.monotonic()
                        writer.add(row, picture, extension)
                        metrics.step_seconds().observe(time.monotonic() - started, tags={"step": "write"})
                    tally.flush(self._crawler.in_flight, self._crawler.throttled)
                tally.flush(self._crawler.in_flight, self._crawler.throttled, now=True)
                more |= tally.stats() | ({"supersedes": shard.part.supersedes} if shard.part.supersedes else {})
                written = writer.stats()
        finally:
            order.close()
        tally.committed()
        return written | more

    def _hold(self, shard: _Shard, change: int) -> None:
        """Count bytes that wait for a decoder or a writer; while there are too many, no request is sent."""
        with self._buffer_lock:
            if not shard.is_over:
                shard.held_bytes += change
                self._count(change)

    def _let_go(self, shard: _Shard) -> None:
        """Count what still waits for a shard that has ended no longer; one that failed may leave much."""
        with self._buffer_lock:
            shard.is_over = True
            self._count(-shard.held_bytes)

    def _count(self, change: int) -> None:
        before, self._buffered = self._buffered, self._buffered + change
        after, limit = self._buffered, self._config.buffer_bytes
        # Under the lock, so that the loop hears of crossings in the order in which they came.
        if before <= limit < after:
            self._loop.call_soon_threadsafe(self._crawler.room.clear)
        elif after <= limit < before:
            self._loop.call_soon_threadsafe(self._crawler.room.set)


def _hashing(config: IngestConfig) -> IngestConfig:
    """Return a configuration under which pictures are hashed, to be compared with those taken down."""
    return config.model_copy(update={"image": config.image.model_copy(update={"phash": True})})
