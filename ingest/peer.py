"""The same shard by the peer: img2dataset's own downloader and resizer, under this corpus' commit rules.

The oracle of parity, and the way back for its users. It is imported when a worker is made and not before.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import threading
import time
from contextlib import closing
from typing import Any

import fsspec
import pyarrow as pa
from PIL import Image

from infra import metrics
from infra.errors import UserError
from infra.storage import Folder
from ingest import part as parts
from ingest.blur import BadBoxesError, parse_boxes
from ingest.config import IngestConfig
from ingest.consent import RESERVATION
from ingest.crawl import Fetched
from ingest.image import pdq
from ingest.opener import Asked, Opener
from ingest.peer_words import verdict
from ingest.reorder import RowOrder
from ingest.sidecar import row_taken_down, row_without_picture
from ingest.tally import Tally
from shards import tombstones
from shards.barred import Barred, Entry
from shards.layout import RAW, Reason, Status, shard_name
from shards.writer import ShardWriter, writing

MOST_THREADS = 256
_PLACE, _BOXES = "__row__", "__boxes__"
_NOT_KEPT_TO = {
    "fetch": (
        "per_host_in_flight", "per_host_per_s", "crawl_delay_cap_s", "min_bytes_per_s", "slow_grace_s", "backoff_s",
        "backoff_cap_s", "retry_after_cap_s", "row_s", "retry_budget", "breaker_failures", "breaker_rest_s",
        "breaker_rests", "max_wire_bytes", "max_body_bytes", "robots", "dns_in_flight", "dns_keep_s",
        "dns_keep_failure_s",
    ),
    "image": ("background", "max_pixels", "phash"),
    "ingest": ("decoders", "decode_s", "decoder_bytes"),
}  # fmt: skip


class PeerWorker:
    """Makes shards out of plan parts as `ingest.worker.ShardWorker` does, through img2dataset's Downloader.

    The peer has a thread for each request, one timeout (for each wait, not for the whole), and tries whatever
    failed again at once. It keeps to no robots.txt, TDM reservation, limit on a host or bound on bytes, pixels and
    rate, ignores a `background`, takes no perceptual hash, and decodes in the worker's own process, which a native
    fault ends. `ingest.opener` holds it to the rest: User-Agent, addresses that may be asked (on redirects as
    well), certificates, number of redirects, no second request after a 4xx or an opt-out, and the shard's
    deadline, after which nothing more is sent. Among its `sha256` and sizes there is no original size for pictures
    it filters out.
    """

    # The peer silences its decoder by the file descriptors of the process, and urllib has one opener in it.
    _running = threading.Lock()

    def __init__(self, corpus: str, config: IngestConfig, workers: int = 1, number: int = 0) -> None:
        """`workers` and `number` are as a ShardWorker's; neither matters here.

        Raises:
            UserError: img2dataset is not installed.
        """
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else it asks a registry whenever it is imported
        try:
            from img2dataset.blurrer import BoundingBoxBlurrer
            from img2dataset.downloader import Downloader, is_disallowed
            from img2dataset.resizer import Resizer
        except ImportError as error:
            raise UserError(
                f'engine img2dataset: {error}; install the extra: pip install "pairmill[img2dataset]"'
            ) from None
        self._corpus, self._raw, self._config = Folder(corpus), Folder(corpus) / RAW, config
        self._downloader = Downloader
        self._barred = tombstones.barred(self._corpus)
        self._threads = max(1, min(config.fetch.concurrency, MOST_THREADS))
        self._words = [word for word in config.fetch.opt_out if word != RESERVATION]
        self._is_refusal = functools.partial(
            is_disallowed, user_agent_token=config.fetch.agent_token, disallowed_header_directives=self._words
        )
        image = config.image
        self._resizer = _Measured(
            Resizer(
                image_size=image.size, resize_mode=image.resize, resize_only_if_bigger=image.only_if_bigger,
                encode_quality=3 if image.format == "png" else image.quality, encode_format=image.format,
                # It would keep the original bytes of a picture that it blurs and does not resize, faces and all.
                skip_reencode=image.skip_reencode and image.faces_col is None,
                min_image_size=image.min_side, max_image_area=image.max_area or float("inf"),
                max_aspect_ratio=image.max_aspect or float("inf"),
                blurrer=BoundingBoxBlurrer() if image.faces_col else None,
            )
        )  # fmt: skip

    def run(self, part: int) -> dict[str, Any]:
        """Make the shard of plan part `part` and commit it; return the content of its `_stats.json`.

        Raises:
            RunError: the part is damaged, or the disk is full. No trace of the shard is left.
        """
        shard = parts.read(self._corpus, part)
        more: dict[str, Any] = {"engine": "img2dataset"}
        order = RowOrder(self._config.buffer_bytes, self._raw.url if self._raw.is_local else None)
        with self._running, writing(self._raw, shard_name(part), shard.schema, more) as writer, closing(order):
            opener = Opener(self._config.fetch, self._is_refusal)
            making = _Making(shard, self._config, opener, self._resizer, order, writer, self._barred)
            self._download(making)
            making.tally.flush(0, now=True)
            more |= making.tally.stats() | ({"supersedes": shard.supersedes} if shard.supersedes else {})
            written = writer.stats()
        making.tally.committed()
        return written | more

    def close(self) -> None:
        """End the worker; it holds nothing."""

    def _download(self, making: _Making) -> None:
        """Run the peer over the rows that it may have; see that each row has ended, by it or here."""
        table = making.sift()
        deadline_s = self._config.shard_deadline_s
        why = f"not done when the shard's deadline of {deadline_s or 0:g} s came"
        timer = threading.Timer(deadline_s, making.opener.stop, (why,)) if deadline_s else None
        # In this process' memory, so that no file is left behind by one that is killed.
        store, folder = fsspec.filesystem("memory"), f"/pairmill-peer/{os.getpid()}"
        rows = f"{folder}/{making.shard.number}.feather"
        with store.open(rows, "wb") as stream, pa.ipc.new_file(stream, table.schema) as into:
            into.write_table(table)
        try:
            if timer is not None:
                timer.start()
            with making.opener.installed():
                peer = self._peer(making, f"memory://{folder}", table.num_rows)
                peer.download_shard((making.shard.number, f"memory://{rows}"))
        finally:
            if timer is not None:
                timer.cancel()
            store.rm(folder, recursive=True)
        making.finish()

    def _peer(self, making: _Making, folder: str, rows: int) -> Any:
        fetch, image = self._config.fetch, self._config.image
        return self._downloader(
            sample_writer_class=lambda *_: making, resizer=self._resizer, thread_count=self._threads,
            save_caption=False, extract_exif=False, output_folder=folder, column_list=["url", _PLACE, _BOXES],
            timeout=min(fetch.total_s, fetch.first_byte_s), number_sample_per_shard=max(2, rows), oom_shard_count=5,
            compute_hash="sha256", verify_hash_type=None, encode_format=image.format, retries=fetch.retries,
            user_agent_token=fetch.agent_token, disallowed_header_directives=self._words or None,
            blurring_bbox_col=_BOXES if image.faces_col else None,
        )  # fmt: skip


def not_kept_to(config: IngestConfig) -> str:
    """Return the line that says what the peer does not do, and which options other than default it ignores."""
    named = []
    for section, names in _NOT_KEPT_TO.items():
        model = config if section == "ingest" else getattr(config, section)
        prefix = "" if section == "ingest" else f"{section}."
        for name in names:
            value = getattr(model, name)
            if value and value != type(model).model_fields[name].default:  # a bound that is off is kept to
                named.append(prefix + name)
    line = (
        "engine img2dataset: no robots.txt or TDM reservation, no bound on hosts, bytes and pixels, no perceptual hash"
    )
    return line + (f"; set and without effect: {', '.join(named)}" if named else "")


class _Measured:
    """The peer's resizer, and what it was last called with. It is called row by row, in one thread."""

    def __init__(self, resizer: Any) -> None:
        self._resizer = resizer
        self.body, self.seconds = b"", 0.0

    def __call__(self, stream: Any, boxes: Any) -> Any:
        started = time.monotonic()
        self.body = stream.getvalue()
        made = self._resizer(stream, boxes)
        self.seconds = time.monotonic() - started
        return made


class _Making:
    """One shard in the making; to the peer it is the writer that is called with each row at its end."""

    def __init__(
        self, shard: parts.Part, config: IngestConfig, opener: Opener, resizer: _Measured, order: RowOrder,
        writer: ShardWriter, barred: Barred,
    ) -> None:  # fmt: skip
        self.shard, self.opener, self.tally = shard, opener, Tally()
        self._config, self._resizer, self._order, self._writer, self._barred = config, resizer, order, writer, barred
        self._ended: set[int] = set()
        self._failure: Exception | None = None

    def sift(self) -> pa.Table:
        """End the rows that need no request; return the others as the peer wants them."""
        faces = self._config.image.faces_col
        taken: list[dict[str, Any]] = []
        for index, row in enumerate(self.shard.rows):
            earlier = self.shard.elsewhere.get(row["key"])
            if earlier is not None:
                status, reason = Status(earlier[0]), Reason(earlier[1])
                self._end(index, Fetched(None, status, reason, "tried again in another shard"))
                continue
            barred = self._barred.row(row["key"], row["url"])
            if barred is not None:
                self._refuse(index, Fetched(), barred)
                continue
            try:
                boxes = parse_boxes(row[faces]) if faces else []
            except BadBoxesError as error:
                # Without its boxes a face would stay as it is: such a picture is not taken.
                self._end(index, Fetched(None, Status.FAILED_TO_RESIZE, Reason.BAD_BOXES, str(error)))
                continue
            taken.append({"url": row["url"], _PLACE: index, _BOXES: [list(box) for box in boxes]})
        boxes_type = pa.list_(pa.list_(pa.float64()))
        schema = pa.schema([("url", pa.string()), (_PLACE, pa.int64()), (_BOXES, boxes_type)])
        return pa.Table.from_pylist(taken, schema)

    def write(self, picture: bytes | None, _key: str, _caption: Any, meta: dict[str, Any]) -> None:
        """Take a row from the peer, which goes on whatever is raised here: a failure waits for `finish`."""
        if self._failure is not None:
            return
        try:
            self._take(picture, meta)
        except Exception as error:
            self._failure = error
            self.opener.stop("the shard is given up")
            raise

    def close(self) -> None:
        """Do nothing: the shard ends with `finish`."""

    def finish(self) -> None:
        """End the rows that the peer gave no account of. Raises what went wrong on the way."""
        if self._failure is not None:
            raise self._failure
        for index in sorted(set(range(len(self.shard.rows))) - self._ended):
            lost = "img2dataset gave no account of this row"
            self._end(index, Fetched(None, Status.FAILED_TO_RESIZE, Reason.DECODE_ERROR, lost))

    def _take(self, picture: bytes | None, meta: dict[str, Any]) -> None:
        index, url = meta[_PLACE], meta["url"]
        asked = self.opener.asked.pop(url, Asked())
        met = meta["status"] != "failed_to_download"
        body = self._resizer.body if met else None
        status, reason, detail, transient = verdict(meta["status"], meta["error_message"], body, asked.http_status)
        fetched = Fetched(
            body, status, reason, detail, http_status=asked.http_status, final_url=asked.final_url,
            content_type=asked.content_type, attempts=asked.attempts, transient=transient,
            opt_out=f"X-Robots-Tag: {asked.robots_tag}" if reason == Reason.OPT_OUT else None,
        )  # fmt: skip
        facts: dict[str, Any] = {}
        barred = self._bars(fetched.final_url, meta, picture) if status == Status.SUCCESS else None
        if barred is not None:
            self._refuse(index, fetched, barred)
            return
        if status == Status.SUCCESS:
            names = ("sha256", "width", "height", "original_width", "original_height")
            facts = {name: meta[name] for name in names} | {"bytes": len(body or b"")}
        elif body is not None and reason in (Reason.NOT_AN_IMAGE, Reason.DECODE_ERROR):
            facts = {"sha256": hashlib.sha256(body).hexdigest(), "bytes": len(body)}
        self._end(index, fetched, facts, picture)
        if met:
            metrics.step_seconds().observe(self._resizer.seconds, tags={"step": "decode"})

    def _bars(self, url: str | None, meta: dict[str, Any], picture: bytes | None) -> Entry | None:
        found = self._barred.url(url) or self._barred.body(meta["sha256"])
        if found is None and self._barred.has_pictures and picture is not None:
            with Image.open(io.BytesIO(picture)) as image:
                found = self._barred.picture(pdq(image.convert("RGB"))[0])
        return found

    def _refuse(self, index: int, fetched: Fetched, entry: Entry) -> None:
        """End a row that a take-down bars."""
        self._end(index, fetched, row_taken_down(self.shard.rows[index], fetched, entry))

    def _end(
        self,
        index: int,
        fetched: Fetched,
        facts: dict[str, Any] | None = None,
        picture: bytes | None = None,
    ) -> None:
        self._ended.add(index)
        row = row_without_picture(self.shard.rows[index], fetched) | (facts or {})
        self.tally.add(row, fetched)
        self._order.add(index, row, picture)
        for ready, image in self._order.ready():
            self._writer.add(ready, image, self._config.image.format)
        self.tally.flush(0)
