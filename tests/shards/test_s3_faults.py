"""An S3 server that refuses, cuts answers short or falls silent: it costs time, or the shard is named."""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import s3fs

from infra.errors import RunError
from infra.storage import Folder
from shards.stream import ShardStream
from tests.shards.faulty_s3 import Fault, FaultyS3, faulty

Slots = list[tuple[int, int, str, str]]


@pytest.fixture(scope="module")
def local(shards_of: Callable[..., Folder]) -> Folder:
    return shards_of(40, 30, 26)


@pytest.fixture(scope="module")
def url(s3_gateway: Any, local: Folder) -> str:
    url: str = s3_gateway.url(secrets.token_hex(6))
    for name in local.names():
        Folder(url).write(name, local.read(name))
    return url


@pytest.fixture
def proxy(s3_gateway: Any, url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """A proxy that every client goes through, before the server that holds the shards of `url`."""
    with faulty(s3_gateway.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        s3fs.S3FileSystem.clear_instance_cache()
        yield proxy
    s3fs.S3FileSystem.clear_instance_cache()


def stream(folder: str | Folder, **options: Any) -> ShardStream:
    return ShardStream(folder, global_batch_size=12, lanes=4, seed=5, **options)


def seen(stream: ShardStream) -> Slots:
    """Step, slot, key and digest of every sample."""
    return [
        (sample["__step__"], sample["__slot__"], sample["__key__"], hashlib.sha256(sample["jpg"]).hexdigest())
        for sample in stream.samples()
    ]


@pytest.mark.parametrize(
    ("fault", "times", "asked_again"),
    [("none", 0, 0), ("503", 40, 40), ("half, then closed", 3, 3), ("half, then silent", 3, 3), ("silent", 3, 3)],
)
def test_what_passes_costs_time_and_nothing_else(
    proxy: FaultyS3, url: str, local: Folder, fault: Fault, times: int, asked_again: int
) -> None:
    there = stream(url, read_timeout_s=2.0)
    proxy.fail(fault, times)
    assert seen(there) == seen(stream(local))
    assert there.holes == 0
    assert proxy.asked > asked_again
    assert proxy.times < 0


def test_a_refusal_ends_the_run_and_names_the_shard(proxy: FaultyS3, url: str) -> None:
    there = stream(url)
    proxy.fail("403", match="00001.tar")
    with pytest.raises(RunError, match=rf"{url}/00001\.tar: this shard cannot be read \(PermissionError"):
        seen(there)


def test_a_shard_that_is_refused_is_skipped_and_counted_as_told(
    proxy: FaultyS3, url: str, local: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    there = stream(url, skip_unreadable=True)
    proxy.fail("403", match="00001.tar")
    with caplog.at_level(logging.WARNING, logger="pairmill"):
        got, whole = seen(there), seen(stream(local))
    lost = [place for place in whole if place[2].startswith("00001")]
    assert there.holes == len(lost) == 30
    assert [there for there, here in zip(got, whole, strict=True) if here not in lost] == [
        here for here in whole if here not in lost
    ]
    assert caplog.text.count(f"{url}/00001.tar: this shard cannot be read (PermissionError") == 1


@pytest.mark.parametrize("fault", ["503", "silent"])
def test_what_does_not_pass_is_named_when_patience_ends(proxy: FaultyS3, url: str, fault: Fault) -> None:
    there = stream(url, read_timeout_s=1.0, patience_s=1.5)
    proxy.fail(fault)
    with pytest.raises(
        RunError, match=rf"{url}/0000\d\.tar: this shard cannot be read \(TimeoutError: not read within 1 s"
    ):
        seen(there)


@pytest.mark.slow
def test_half_a_minute_of_silence_is_outlasted_by_default(proxy: FaultyS3, url: str, local: Folder) -> None:
    there = stream(url)
    proxy.fail("silent")
    back = threading.Timer(31.0, proxy.fail, ("none",))
    back.start()
    assert seen(there) == seen(stream(local))
    back.join()
