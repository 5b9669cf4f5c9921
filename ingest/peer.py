"""The same shard by the peer: img2dataset's own downloader and resizer, under this corpus' commit rules.

The oracle of parity, and the way back for its users. It is imported when a worker is made and not before.
"""

from __future__ import annotations

import re
import socket
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa

from infra.errors import UserError
from infra.logs import log
from infra.storage import Folder
from ingest import part as parts
from ingest.addresses import literal_address
from ingest.blur import BadBoxesError, parse_boxes
from ingest.config import IngestConfig
from ingest.consent import RESERVATION
from ingest.crawl import Fetched
from ingest.reorder import RowOrder
from ingest.sidecar import row_without_picture
from ingest.tally import Tally
from ingest.urls import host_of
from shards.layout import RAW, Reason, Status, shard_name
from shards.writer import writing

INSTALL = "install it with `pip install 'pairmill[img2dataset]'`"
MOST_THREADS = 256
_PLACE, _BOXES = "__row__", "__boxes__"
_VERDICTS = {
    "image too small": (Status.FILTERED, Reason.TOO_SMALL),
    "image area too large": (Status.FILTERED, Reason.TOO_LARGE_AREA),
    "aspect ratio too large": (Status.FILTERED, Reason.ASPECT),
    "Use of image disallowed by X-Robots-Tag directive": (Status.FILTERED, Reason.OPT_OUT),
}
_NETWORK = (
    (re.compile(r"HTTP Error (\d{3})"), Reason.HTTP_STATUS, False),
    (re.compile(r"redirect", re.IGNORECASE), Reason.TOO_MANY_REDIRECTS, False),
    (re.compile(r"timed? ?out", re.IGNORECASE), Reason.TIMEOUT, True),
    (re.compile(r"SSL|certificate", re.IGNORECASE), Reason.TLS, False),
    (re.compile(r"Name or service|name resolution|nodename|getaddrinfo", re.IGNORECASE), Reason.DNS, False),
    (re.compile(r"IncompleteRead"), Reason.TRUNCATED_BODY, True),
    (re.compile(r"refused|unreachable|No route", re.IGNORECASE), Reason.CONNECT, True),
    (re.compile(r"unknown url type|no host|control characters|nonnumeric port"), Reason.BAD_URL, False),
)
"""What the peer says of a failure: words, the reason they mean here, and whether another try may do better."""


class PeerWorker:
    """Makes shards out of plan parts as `ingest.worker.ShardWorker` does, through img2dataset's Downloader.

    The peer has one thread a request, one timeout, immediate retries and a browser's User-Agent with our word in
    it. It knows no bound on hosts, bytes, pixels or redirects and no robots.txt, and takes no perceptual hash.
    Addresses that are not public are refused before a row is handed to it; what it is redirected to is not seen.
    """

    def __init__(self, corpus: str, config: IngestConfig, workers: int = 1) -> None:
        """`workers` is how many workers share the run. Raises UserError if img2dataset is not installed."""
        try:
            from img2dataset.blurrer import BoundingBoxBlurrer
            from img2dataset.downloader import Downloader
            from img2dataset.resizer import Resizer
        except ImportError as error:
            raise UserError(
                f"engine img2dataset: {error}; install it with `pip install 'pairmill[img2dataset]'`"
            ) from None
        self._corpus, self._raw, self._config = Folder(corpus), Folder(corpus) / RAW, config
        self._downloader = Downloader
        image = config.image
        self._resizer = Resizer(
            image_size=image.size, resize_mode=image.resize, resize_only_if_bigger=image.only_if_bigger,
            encode_quality=3 if image.format == "png" else image.quality, encode_format=image.format,
            skip_reencode=image.skip_reencode, min_image_size=image.min_side,
            max_image_area=image.max_area or float("inf"), max_aspect_ratio=image.max_aspect or float("inf"),
            blurrer=BoundingBoxBlurrer() if image.faces_col else None,
        )  # fmt: skip
        self._running = threading.Lock()
        log.warning(
            "engine img2dataset: no robots.txt, per-host limits, byte, pixel and redirect caps, deadline or "
            "perceptual hash; use --engine native for these"
        )

    def run(self, part: int) -> dict[str, Any]:
        """Make the shard of plan part `part` and commit it; return the content of its `_stats.json`.

        Raises:
            RunError: the part is damaged, or the disk is full. No trace of the shard is left.
        """
        shard = parts.read(self._corpus, part)
        tally, more = Tally(), dict[str, Any]()
        # The peer silences its decoder by file descriptors of the whole process: one shard at a time.
        with self._running, writing(self._raw, shard_name(part), shard.schema, more) as writer:
            order = RowOrder(self._config.buffer_bytes, self._raw.url if self._raw.is_local else None)
            ended: set[int] = set()

            def end(index: int, row: dict[str, Any], picture: bytes | None) -> None:
                ended.add(index)
                tally.add(row, Fetched(attempts=row["attempts"]), 0.0)
                order.add(index, row, picture)
                for ready, image in order.ready():
                    writer.add(ready, image, self._config.image.format)

            try:
                self._download(shard, end)
                for index in sorted(set(range(len(shard.rows))) - ended):
                    lost = "img2dataset gave no account of this row"
                    end(index, *_failed(shard.rows[index], Status.FAILED_TO_RESIZE, Reason.DECODE_ERROR, lost))
            finally:
                order.close()
            tally.flush(0, now=True)
            more |= tally.stats() | {"engine": "img2dataset"}
            more |= {"supersedes": shard.supersedes} if shard.supersedes else {}
            written = writer.stats()
        tally.committed()
        return written | more

    def close(self) -> None:
        """End the worker; it holds nothing."""

    def _download(self, shard: parts.Part, end: Callable[[int, dict[str, Any], bytes | None], None]) -> None:
        """Run the peer over the rows it may have; every other row ends here."""
        config = self._config
        taken: list[tuple[int, list[Any] | None]] = []
        blocked = self._blocked_hosts(shard.rows)
        for index, row in enumerate(shard.rows):
            earlier = shard.elsewhere.get(row["key"])
            detail = blocked.get(host_of(row["url"]) or "")
            try:
                boxes = parse_boxes(row[config.image.faces_col]) if config.image.faces_col else None
            except BadBoxesError as error:
                end(index, *_failed(row, Status.FAILED_TO_RESIZE, Reason.BAD_BOXES, str(error)))
                continue
            if earlier is not None:
                status, reason = Status(earlier[0]), Reason(earlier[1])
                end(index, *_failed(row, status, reason, "tried again in another shard"))
            elif detail is not None:
                end(index, *_failed(row, Status.FAILED_TO_DOWNLOAD, Reason.BLOCKED_ADDRESS, detail))
            else:
                taken.append((index, [list(box) for box in boxes or ()]))
        if not taken:
            return
        rows = shard.rows
        columns = {"url": [rows[at]["url"] for at, _ in taken], _PLACE: [at for at, _ in taken]}
        table = pa.table(columns | {_BOXES: pa.array([boxes for _, boxes in taken], pa.list_(pa.list_(pa.float64())))})

        class Writer:
            """What the peer calls with each row at its end."""

            def __init__(self, *_told: Any) -> None: ...

            def write(self, picture: bytes | None, _key: str, _caption: Any, meta: dict[str, Any]) -> None:
                index = meta[_PLACE]
                end(index, *_translated(rows[index], meta, picture))

            def close(self) -> None: ...

        with tempfile.TemporaryDirectory(prefix="pairmill-peer-") as folder:
            feather = Path(folder) / "rows.feather"
            with pa.OSFile(str(feather), "wb") as stream, pa.ipc.new_file(stream, table.schema) as into:
                into.write_table(table)
            self._made(Writer, folder, len(taken)).download_shard((shard.number, str(feather)))

    def _made(self, writer: type[Any], folder: str, rows: int) -> Any:
        fetch, image = self._config.fetch, self._config.image
        words = [word for word in fetch.opt_out if word != RESERVATION]
        return self._downloader(
            sample_writer_class=writer, resizer=self._resizer, thread_count=min(fetch.concurrency, MOST_THREADS),
            save_caption=False, extract_exif=False, output_folder=folder, column_list=["url", _PLACE, _BOXES],
            timeout=fetch.total_s, number_sample_per_shard=max(2, rows), oom_shard_count=5, compute_hash="sha256",
            verify_hash_type=None, encode_format=image.format, retries=fetch.retries,
            user_agent_token=fetch.agent_token, disallowed_header_directives=words or None,
            blurring_bbox_col=_BOXES if image.faces_col else None,
        )  # fmt: skip

    def _blocked_hosts(self, rows: list[dict[str, Any]]) -> dict[str, str]:
        """Return the hosts among the rows' that may not be asked, each with the reason in words."""
        if self._config.fetch.allow_private:
            return {}
        hosts = sorted({host_of(row["url"]) or "" for row in rows})
        with ThreadPoolExecutor(self._config.fetch.dns_in_flight, "names") as lookups:
            found = dict(zip(hosts, lookups.map(self._blocked, hosts), strict=True))
        return {host: detail for host, detail in found.items() if detail is not None}

    def _blocked(self, host: str) -> str | None:
        try:
            literal = literal_address(host)
            known = [literal] if literal else [str(one[4][0]) for one in socket.getaddrinfo(host, None)]
        except (OSError, UnicodeError):
            return None  # the peer will find no address either, and say so
        blocked = [address for address in known if not self._config.fetch.may_ask(address)]
        return f"{host} is {blocked[0]}, not a public address" if blocked else None


def _failed(
    row: dict[str, Any], status: Status, reason: Reason, detail: str, **facts: Any
) -> tuple[dict[str, Any], None]:
    return row_without_picture(row, Fetched(None, status, reason, detail, **facts)), None


def _translated(
    row: dict[str, Any], meta: dict[str, Any], picture: bytes | None
) -> tuple[dict[str, Any], bytes | None]:
    """Return a sidecar row and its picture from what the peer noted of them."""
    message = " ".join(str(meta["error_message"] or "").split())[:200]
    if meta["status"] == "success":
        names = ("sha256", "width", "height", "original_width", "original_height")
        done = row_without_picture(row, Fetched(attempts=1))
        return done | {name: meta[name] for name in names}, picture
    if message in _VERDICTS:
        status, reason = _VERDICTS[message]
        return _failed(row, status, reason, message, attempts=1, opt_out=message if reason == Reason.OPT_OUT else None)
    if meta["status"] == "failed_to_resize":
        return _failed(row, Status.FAILED_TO_RESIZE, Reason.DECODE_ERROR, message, attempts=1)
    for words, reason, is_transient in _NETWORK:
        told = words.search(message)
        if told:
            code = int(told[1]) if reason == Reason.HTTP_STATUS else None
            again = is_transient or (code is not None and (code == 429 or code >= 500))
            failed = Status.FAILED_TO_DOWNLOAD
            return _failed(row, failed, reason, message, attempts=1, http_status=code, transient=again)
    return _failed(row, Status.FAILED_TO_DOWNLOAD, Reason.CONNECTION_RESET, message, attempts=1, transient=True)
