"""Answers made to hurt: a row ends by its name, its shard is committed, and the worker goes on."""

from __future__ import annotations

import asyncio
import io
import json
import random
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from infra.cluster import ClusterConfig, run_bounded
from ingest.config import IngestConfig, PlanConfig
from ingest.plan import plan
from ingest.run import ingest
from ingest.worker import BrokenCrawlerError, ShardWorker
from shards.layout import Reason, Status
from shards.verify import verify

ROBOTS = b"User-agent: *\nDisallow: /private/\n"


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((96, 80), 60).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


JPEG = picture()


def answer(*headers: bytes, status: bytes = b"200 OK", body: bytes = JPEG) -> bytes:
    lines = (b"HTTP/1.1 " + status, *headers, b"Connection: close", b"", body)
    return b"\r\n".join(lines)


class RawServer:
    """Sends bytes as they are: what `reply` makes of a path, and a robots.txt. `asked` has the paths."""

    def __init__(self, reply: Callable[[str], bytes]) -> None:
        self.asked: list[str] = []
        self.port = 0
        self._reply = reply

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            path = head.split(b" ", 2)[1].decode()
            self.asked.append(path)
            writer.write(answer(body=ROBOTS) if path == "/robots.txt" else self._reply(path))
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client hung up
        finally:
            writer.close()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"


@contextmanager
def serving(reply: Callable[[str], bytes]) -> Iterator[RawServer]:
    server, loop = RawServer(reply), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    started = asyncio.run_coroutine_threadsafe(asyncio.start_server(server.handle, "127.0.0.1", 0), loop).result()
    server.port = started.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(started.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def planned(folder: Path, urls: list[str], rows_per_shard: int = 10_000) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps({"url": url, "caption": "a thing"}) + "\n" for url in urls))
    plan(str(folder / "corpus"), PlanConfig(urls=str(folder / "rows.jsonl"), rows_per_shard=rows_per_shard))
    return folder / "corpus"


def made(corpus: Path, config: IngestConfig, shards: int = 1) -> dict[str, dict[str, Any]]:
    """Make the shards in one worker; return the sidecars' rows by the path of their URL."""
    with closing(ShardWorker(str(corpus), config)) as worker:
        for part in range(shards):
            worker.run(part)
    assert verify(str(corpus / "raw")).faults == []
    rows = [row for path in sorted((corpus / "raw").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    return {"/" + row["url"].split("/", 3)[3]: row for row in rows}


def test_bytes_that_are_no_text_cost_no_shard(tmp_path: Path, config: IngestConfig) -> None:
    replies = {
        "/type.jpg": answer(b"Content-Type: image/jpeg; name=caf\xe9"),
        "/long.jpg": answer(b"Content-Type: image/jpeg; name=" + b"\xe9" * 20_000),
        "/noai.jpg": answer(b"X-Robots-Tag: noai, \xe9"),
        "/moved.jpg": answer(b"Location: /caf\xe9/\xc3\xa9.jpg", status=b"302 Found"),
        "/barred.jpg": answer(b"Location: /private/caf\xe9.jpg", status=b"302 Found"),
        "/far.jpg": answer(b"Location: /" + b"a" * 9000, status=b"302 Found"),
        "/nowhere.jpg": answer(b"Location: http://caf\xe9\xff:x/", status=b"302 Found"),
    }
    with serving(lambda path: replies.get(path, answer())) as server:
        rows = made(planned(tmp_path, [server.url(path) for path in replies]), config)
        assert "/caf%E9/%C3%A9.jpg" in server.asked
        assert not [path for path in server.asked if path.startswith("/private")]
    ends = {path: row["reason"] for path, row in rows.items()}
    assert ends == {
        "/type.jpg": "", "/long.jpg": "", "/noai.jpg": "opt_out", "/moved.jpg": "", "/barred.jpg": "robots_txt",
        "/far.jpg": "bad_url", "/nowhere.jpg": "bad_url",
    }  # fmt: skip
    assert rows["/type.jpg"]["content_type"] == "image/jpeg; name=caf\\udce9"
    assert len(rows["/long.jpg"]["content_type"]) == 2000
    assert rows["/noai.jpg"]["opt_out"] == "X-Robots-Tag: noai, \\udce9"
    assert rows["/moved.jpg"]["final_url"] == server.url("/caf%E9/%C3%A9.jpg")


GRAINS = [
    b"image/jpeg", b"/moved/", b"/private/", b"http://", b"//", b"[", b"%", b"@127.0.0.1", b":80", b"1", b"9" * 30,
    b"Sat, 01 Jan 99999999999999 00:00:00 GMT", b"Sat, 01 Jan 2000 00:00:00 +9999999999", b"\xc2\xb2", b" ", b"-1",
    b", noai, ", b"noindex,", b"pairmill:", b"gzip", b"deflate", b"br", b"\xe2\x91\xa0", b"\xe3\x80\x82", b"caf\xe9",
    b"\xed\xa0\x80",
]  # fmt: skip
BYTES = bytes(byte for byte in range(256) if byte >= 32 and byte != 127)
USUAL = {b"3": b"Location", b"4": b"Retry-After", b"5": b"Retry-After"}
NAMES = [
    b"Content-Type",
    b"Location",
    b"Retry-After",
    b"X-Robots-Tag",
    b"TDM-Reservation",
    b"Content-Encoding",
    b"ETag",
]


def hostile_value(rng: random.Random) -> bytes:
    """Return a header's value: pieces of what such values are made of, and any bytes that HTTP lets pass."""
    parts = [rng.choice(GRAINS) if rng.random() < 0.7 else bytes(rng.choices(BYTES, k=5)) for _ in range(3)]
    return b"".join(parts[: rng.randrange(1, 4)])


def hostile_answer(path: str) -> bytes:
    rng = random.Random(path)
    status = rng.choice(
        [b"200 OK", b"200 \xe9", b"302 Found", b"301 \xe9", b"503 No", b"429 No", b"404 No", b"599 \xff"]
    )
    names = {*rng.sample(NAMES, 2), USUAL.get(status[:1], b"Content-Type")}
    if rng.random() < 0.05:
        names.add(b"Content-Length")
    headers = [name + b": " + hostile_value(rng) for name in sorted(names)]
    return answer(*headers, status=status, body=rng.choice([JPEG, JPEG[:200], b"", b"\xff" * 300]))


def test_headers_of_any_bytes_cost_their_row_and_no_more(tmp_path: Path, config: IngestConfig) -> None:
    hasty = {"first_byte_s": 15.0, "total_s": 20.0, "retries": 1, "retry_after_cap_s": 0.1, "max_redirects": 2}
    here = {
        "allow_private": False,
        "allow_networks": ("127.0.0.1/32",),
        "dns_keep_failure_s": 60.0,
        "breaker_rest_s": 0.1,
    }
    config = config.model_copy(update={"fetch": config.fetch.model_copy(update=hasty | here)})
    with serving(hostile_answer) as server:
        corpus = planned(tmp_path, [server.url(f"/{number}.jpg") for number in range(400)], rows_per_shard=200)
        rows = made(corpus, config, shards=2)
    reasons = Counter(row["reason"] for row in rows.values())
    assert len(rows) == 400 == sum(reasons.values())
    assert reasons[Reason.CRAWLER_ERROR] == 0, [row["detail"] for row in rows.values()]
    assert {"", "bad_url", "http_status", "opt_out"} <= reasons.keys()


@pytest.mark.parametrize("engine", ["native", "img2dataset"])
def test_a_host_of_other_letters_that_fails_costs_its_row(
    tmp_path: Path, config: IngestConfig, local_ray: ClusterConfig, engine: str
) -> None:
    if engine == "img2dataset":
        pytest.importorskip("img2dataset")
    with serving(lambda _: answer()) as server:
        corpus = planned(tmp_path, ["http://bücher.invalid/1.jpg", server.url("/good.jpg")])
        totals = ingest(str(corpus), config.model_copy(update={"engine": engine}), local_ray)
    assert totals["by_status"]["success"] == totals["by_status"]["failed_to_download"] == 1
    stats = json.loads((corpus / "raw" / "00000_stats.json").read_text())
    assert list(stats["by_host"]) == ["xn--bcher-kva.invalid"]


def test_encodings_that_are_not_unpacked_are_named(tmp_path: Path, config: IngestConfig) -> None:
    raw = zlib.compressobj(wbits=-15)
    replies = {
        "/br.jpg": answer(b"Content-Encoding: br", body=b"\x0b\x02\x80" + bytes(range(200))),
        "/twice.jpg": answer(b"Content-Encoding: gzip, \xe9", body=b"\x1f\x8b" + bytes(range(200))),
        "/page.jpg": answer(b"Content-Encoding: gzip", body=b"<html>" * 20),
        "/said_br.jpg": answer(b"Content-Encoding: br"),
        "/chunked.jpg": answer(b"Content-Encoding: aws-chunked"),
        "/raw_deflate.jpg": answer(b"Content-Encoding: deflate", body=raw.compress(JPEG) + raw.flush()),
        "/no_deflate.jpg": answer(b"Content-Encoding: deflate"),
    }
    with serving(replies.__getitem__) as server:
        rows = made(planned(tmp_path, [server.url(path) for path in replies]), config)
    ends = {path: row["reason"] for path, row in rows.items()}
    assert ends == dict.fromkeys(replies, "") | {
        "/br.jpg": "content_encoding", "/twice.jpg": "content_encoding", "/page.jpg": "not_an_image",
    }  # fmt: skip
    assert rows["/br.jpg"]["status"] == Status.FAILED_TO_RESIZE
    assert rows["/br.jpg"]["detail"].startswith("Content-Encoding: br; ")


class BreaksOnce(ShardWorker):
    """A worker whose crawler gets a fault of its own, once for all of them: the file `broken` says that it was."""

    def run(self, part: int) -> dict[str, Any]:
        mark = Path(self._corpus.url) / "broken"
        if part == 1 and not mark.exists():
            mark.touch()
            self._loop.call_soon_threadsafe(self._crawler.broken.set_exception, RuntimeError("a fault"))
        return super().run(part)


def test_a_broken_crawler_ends_its_actor_and_the_next_one_does_the_work(
    tmp_path: Path, config: IngestConfig, local_ray: ClusterConfig
) -> None:
    with serving(lambda _: answer()) as server:
        corpus = planned(tmp_path, [server.url(f"/{number}.jpg") for number in range(8)], rows_per_shard=2)
        actor = ray.remote(BreaksOnce).options(num_cpus=1, max_concurrency=2)
        outcomes = list(
            run_bounded(lambda _: actor.remote(str(corpus), config), range(4), workers=1, retries=1, ahead=2)
        )
        assert (corpus / "broken").exists()
        (corpus / "broken").unlink()
        with closing(BreaksOnce(str(corpus), config)) as worker, pytest.raises(BrokenCrawlerError):
            worker.run(1)  # here is no actor to end
    assert sorted(outcome.task for outcome in outcomes) == [0, 1, 2, 3]
    assert [outcome.error for outcome in outcomes] == [None] * 4
    assert len(list((corpus / "raw").glob("*_stats.json"))) == 4
