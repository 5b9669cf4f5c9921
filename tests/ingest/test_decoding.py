"""Decoder processes: what a native fault, a hang, hunger for memory and a fuzzer's files cost."""

from __future__ import annotations

import io
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

from infra.errors import RunError
from ingest import decoding
from ingest.config import ImageConfig, IngestConfig, PlanConfig
from ingest.decoder import examined
from ingest.decoding import Decoders
from ingest.plan import plan
from ingest.worker import ShardWorker
from pairmill.sample_web.process import SampleWeb
from pairmill.sample_web.rows import write_rows

SETTINGS = IngestConfig(image=ImageConfig(size=64))
FUZZED_PER_FORMAT = 150


@pytest.fixture
def decoders() -> Iterator[Decoders]:
    made = Decoders(SETTINGS)
    yield made
    made.close()
    assert decoder_processes() == []


def decoder_processes() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "ingest.decoder" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def encoded(kind: str, side: int = 80, **options: Any) -> bytes:
    rng = np.random.default_rng(side)
    small = Image.fromarray(rng.integers(0, 256, (max(1, side // 8), max(1, side // 8), 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize((side, side)).save(buffer, kind, **options)
    return buffer.getvalue()


def hard_work() -> bytes:
    """A picture that takes a decoder a good while."""
    return encoded("PNG", 7000, compress_level=1)


def while_at_work(future: Future[Any], act: Callable[[psutil.Process], None], times: int) -> None:
    """Do something to each of the next `times` decoders that is seen to work on this body."""
    met: set[int] = set()
    while len(met) < times and not future.done():
        for process in decoder_processes():
            # The start of the process costs as much; what matters is that a signal comes while it lives.
            if process.pid not in met and process.cpu_times().user > 0.2 and process.memory_info().rss > 150e6:
                met.add(process.pid)
                act(process)
        time.sleep(0.005)
    assert len(met) == times


def test_a_native_fault_costs_one_row(decoders: Decoders) -> None:
    good = encoded("JPEG")
    expected = decoders.submit(good).result()
    assert expected[0]["status"] == "success"
    lost = decoders.submit(hard_work())
    behind = [decoders.submit(good) for _ in range(3)]
    while_at_work(lost, lambda process: process.send_signal(signal.SIGSEGV), 2)
    facts, picture = lost.result()
    assert (facts["status"], facts["reason"], picture) == ("failed_to_resize", "decoder_crash", None)
    assert "SIGSEGV" in facts["detail"]
    assert [one.result() for one in behind] == [expected] * 3


def test_a_decoder_killed_from_outside_costs_nothing(decoders: Decoders) -> None:
    work = decoders.submit(hard_work())
    while_at_work(work, lambda process: process.kill(), 1)
    assert work.result()[0]["status"] == "success"


def test_a_hang_ends() -> None:
    decoders = Decoders(SETTINGS.model_copy(update={"decode_s": 0.05}))
    try:
        facts, picture = decoders.submit(hard_work()).result()
        assert (facts["reason"], picture) == ("decode_timeout", None)
        assert "0.05 s" in facts["detail"]
    finally:
        decoders.close()


def test_memory_is_bounded() -> None:
    decoders = Decoders(SETTINGS.model_copy(update={"decoder_bytes": 256 * 2**20}))
    wide = io.BytesIO()
    Image.new("RGB", (8000, 8000)).save(wide, "PNG")
    try:
        facts, _ = decoders.submit(wide.getvalue()).result()
        assert (facts["status"], facts["reason"]) == ("failed_to_resize", "decode_error")
        assert decoders.submit(encoded("JPEG")).result()[0]["status"] == "success"
    finally:
        decoders.close()


def test_decoders_that_do_not_start_are_no_rows_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding.sys, "executable", "/bin/false")
    decoders = Decoders(SETTINGS)
    try:
        with pytest.raises(RunError, match="does not start"):
            decoders.submit(encoded("JPEG")).result()
    finally:
        decoders.close()


def test_the_worker_makes_the_same_shard_while_its_decoder_is_killed(
    tmp_path: Path, config: IngestConfig, web: SampleWeb
) -> None:
    web.reset()
    rows = write_rows(tmp_path / "rows", web.base_urls, limit=60, share=0)
    made = {}
    for name in ("calm", "disturbed"):
        corpus = tmp_path / name
        plan(str(corpus), PlanConfig(urls=str(rows.urls)))
        worker = ShardWorker(str(corpus), config)
        killed = threading.Event()
        if name == "disturbed":
            threading.Thread(target=_kill_a_decoder, args=(killed,), daemon=True).start()
        try:
            worker.run(0)
        finally:
            worker.close()
        assert name == "calm" or killed.is_set()
        made[name] = (corpus / "raw" / "00000.tar").read_bytes()
        assert set(pq.read_table(corpus / "raw" / "00000.parquet")["status"].to_pylist()) == {"success"}
    assert made["calm"] == made["disturbed"]


def _kill_a_decoder(killed: threading.Event) -> None:
    while not killed.is_set():
        for process in decoder_processes():
            os.kill(process.pid, signal.SIGKILL)
            killed.set()
        time.sleep(0.002)


def fuzzed() -> Iterator[bytes]:
    """Malformed files of every format: bytes changed, cut, doubled and spliced, by a seeded fuzzer."""
    rng = random.Random(20)
    kinds = ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "JPEG2000", "ICO", "PPM")
    seeds = {kind: encoded(kind, 48) for kind in kinds}
    seeds["progressive"] = encoded("JPEG", 48, progressive=True)
    seeds["tiff_lzw"] = encoded("TIFF", 48, compression="tiff_lzw")
    seeds["webp_lossless"] = encoded("WEBP", 48, lossless=True)
    for seed in seeds.values():
        for _ in range(FUZZED_PER_FORMAT):
            yield _mutated(seed, rng)


def _mutated(seed: bytes, rng: random.Random) -> bytes:
    data = bytearray(seed)
    for _ in range(rng.choice((1, 1, 2, 4, 16, 64))):
        # Headers are short and matter most.
        at = rng.randrange(min(len(data), rng.choice((64, 512, len(data)))))
        kind = rng.randrange(5)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF))
        elif kind == 2:
            width = rng.choice((2, 4))
            data[at : at + width] = rng.choice((b"\xff" * width, bytes(width), b"\x7f" + b"\xff" * (width - 1)))
        elif kind == 3:
            data[at:at] = data[at : at + rng.randrange(1, 64)]
        elif len(data) > 64:
            del data[at : at + rng.randrange(1, 64)]
    return bytes(data[: rng.randrange(1, len(data))] if rng.random() < 0.2 else data)


def test_a_fuzzers_files_each_cost_one_row_at_most(decoders: Decoders) -> None:
    bodies = list(fuzzed())
    outcomes = [future.result() for future in [decoders.submit(body) for body in bodies]]
    assert len(outcomes) == len(bodies)
    statuses = {facts["status"] for facts, _ in outcomes}
    assert statuses <= {"success", "failed_to_resize", "filtered"}
    assert {"success", "failed_to_resize"} <= statuses
    for facts, picture in outcomes:
        assert (facts["status"] == "success") == (picture is not None)
        if picture is not None:
            Image.open(io.BytesIO(picture)).load()
    # What they left behind in the decoder changes no later picture.
    good = encoded("JPEG")
    assert decoders.submit(good).result() == _as_sent(examined(good, None, SETTINGS))


def _as_sent(outcome: tuple[dict[str, Any], bytes | None]) -> tuple[dict[str, Any], bytes | None]:
    facts, picture = outcome
    return {name: str(value) if name in ("status", "reason") else value for name, value in facts.items()}, picture
