"""A corpus on a real S3 server: repacked there, verified there, streamed through an outage."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

import shards
from infra.cluster import ClusterConfig
from infra.errors import RunError
from infra.storage import Folder
from shards import index
from shards.layout import FINAL, RAW, sample_key
from shards.loader import Loader
from shards.repack import RepackConfig, repack
from shards.stream import ShardStream
from shards.verify import verify

MakeCorpus = Callable[[str, Sequence[int], Sequence[tuple[str, str]]], Folder]


def keys(samples: list[dict[str, Any]]) -> list[str]:
    return [sample["__key__"] for sample in samples]


@pytest.fixture(scope="module")
def corpus(s3_gateway: Any, deduplicated_corpus: MakeCorpus) -> Folder:
    return deduplicated_corpus(s3_gateway.url("corpus"), [40, 30, 50], [(sample_key(0, 3), "exact")])


def test_the_same_from_s3_as_from_a_disk(corpus: Folder, tmp_path: Any) -> None:
    here = Folder(tmp_path)
    for name in (corpus / RAW).names():
        here.write(name, (corpus / RAW).read(name))
    for folder in (corpus / RAW, here):
        index.save(folder, index.build(folder))
    there = [keys(batch) for batch in ShardStream(corpus / RAW, global_batch_size=12, seed=1)]
    assert there == [keys(batch) for batch in ShardStream(here, global_batch_size=12, seed=1)]
    assert len(there) == 96 // 12
    loader = Loader(ShardStream(corpus / RAW, global_batch_size=12, seed=1), workers=2, transform=keys)
    assert list(loader) == there
    assert verify(corpus / RAW).faults == []
    assert shards.open((corpus / RAW).url)[50]["__index__"] == 50


def test_an_outage_costs_time_and_not_the_run(corpus: Folder, s3_gateway: Any) -> None:
    whole = [keys(batch) for batch in ShardStream(corpus / RAW, global_batch_size=6)]
    stream = ShardStream(corpus / RAW, global_batch_size=6, read_ahead_bytes=1, block_samples=1)
    seen = []
    back = threading.Timer(2.0, s3_gateway.start)
    for number, batch in enumerate(stream):
        seen.append(keys(batch))
        if number == 2:
            s3_gateway.stop()
            back.start()
    back.join()
    assert len(seen) == len(whole)
    assert sorted(key for batch in seen for key in batch) == sorted(key for batch in whole for key in batch)
    assert stream.holes == 0


def test_an_outage_that_lasts_names_the_shard(corpus: Folder, s3_gateway: Any) -> None:
    stream = ShardStream(corpus / RAW, global_batch_size=6, patience_s=0.5)
    s3_gateway.stop()
    try:
        with pytest.raises(RunError, match=r"s3://pairs/corpus/raw/0000\d\.tar: this shard cannot be read"):
            next(iter(stream))
    finally:
        s3_gateway.start()


def test_repacked_on_s3(corpus: Folder, local_ray: ClusterConfig) -> None:
    totals = repack(corpus.url, RepackConfig(samples_per_shard=50), local_ray)
    assert (totals["samples"], totals["shards"]) == (95, 2)
    assert verify(corpus / FINAL).faults == []
    stream = ShardStream(corpus / FINAL, global_batch_size=5)
    assert len({sample["__key__"] for sample in stream.samples()}) == 95
