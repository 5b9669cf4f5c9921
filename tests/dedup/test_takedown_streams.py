"""Streams and a take-down: one under way goes on, gives nothing of it from the next epoch on, and moves no other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dedup.takedown import remove
from infra.storage import Folder
from shards import tombstones
from shards.batches import Batches
from shards.loader import Loader
from shards.mixed import MixedStream
from shards.stream import ShardStream
from tests.dedup.conftest import LOCAL

Listed = Callable[..., str]
Seen = dict[tuple[int, int, int], str]
BATCH, STEPS, EPOCHS = 6, 9, 4


def stream(corpus: Folder, **options: Any) -> ShardStream:
    return ShardStream(corpus / "final", global_batch_size=BATCH, epochs=EPOCHS, seed=5, **options)


def raw_key(sample: dict[str, Any]) -> str:
    return str(json.loads(sample["json"])["source_key"])


def seen(batches: Iterator[list[dict[str, Any]]], count: int) -> Seen:
    found = {}
    for _ in range(count):
        for one in next(batches):
            found[one["__epoch__"], one["__step__"], one["__slot__"]] = raw_key(one)
    return found


@pytest.mark.parametrize("way", ["plain", "little read ahead", "cache", "threads", "loader", "mixed"])
def test_a_stream_under_way_goes_on_without_it(corpus: Folder, listed: Listed, tmp_path: Path, way: str) -> None:
    options: dict[str, Any] = {
        "little read ahead": {"read_ahead_bytes": 1}, "cache": {"cache_folder": tmp_path / "cache"},
        "threads": {"decode_threads": 2}, "mixed": {"cache_folder": tmp_path / "cache"},
    }.get(way, {})  # fmt: skip
    if way == "mixed":
        whole: Batches = MixedStream(
            [((corpus / "final").url, 1.0)], global_batch_size=BATCH, epochs=EPOCHS, seed=5, **options
        )
        one: Batches = MixedStream(
            [((corpus / "final").url, 1.0)], global_batch_size=BATCH, epochs=EPOCHS, seed=5, **options
        )
    else:
        whole, one = stream(corpus, **options), stream(corpus, **options)
    expected = seen(iter(whole), EPOCHS * STEPS)
    assert len(expected) == EPOCHS * STEPS * BATCH

    batches = iter(Loader(one, workers=2) if way == "loader" else one)
    before = seen(batches, STEPS + 4)
    remove(corpus.url, listed("host host-2.example", "key 000010004"), LOCAL)
    gone = set(tombstones.all_removed(corpus))
    now = before | seen(batches, (EPOCHS - 1) * STEPS - 4)
    assert next(batches, None) is None
    assert gone < set(expected.values())
    for place, key in expected.items():
        if place[0] >= 2:
            assert now[place] not in gone
        if place[:2] < (1, 4):
            assert now[place] == key
        if key not in gone:
            assert now[place] == key, place


def test_a_later_run_finds_nothing_in_the_cache(corpus: Folder, listed: Listed, tmp_path: Path) -> None:
    expected = seen(iter(stream(corpus, cache_folder=tmp_path / "cache")), STEPS)
    remove(corpus.url, listed("host host-2.example"), LOCAL)
    gone = set(tombstones.all_removed(corpus))
    for options in ({"cache_folder": tmp_path / "cache"}, {"cache_folder": tmp_path / "cache", "needs": ()}, {}):
        later = stream(corpus, **options)
        again = seen(iter(later), STEPS)
        assert not gone & set(again.values())
        assert {place: key for place, key in again.items() if expected[place] not in gone} == {
            place: key for place, key in expected.items() if key not in gone
        }
        assert later.holes == len(gone)


def test_a_state_taken_before_goes_on_after(corpus: Folder, listed: Listed) -> None:
    one = stream(corpus)
    expected = seen(iter(stream(corpus)), EPOCHS * STEPS)
    seen(iter(one), 5)
    remove(corpus.url, listed("key 000010004"), LOCAL)
    other = stream(corpus)
    other.load_state_dict(one.state_dict())
    rest = seen(iter(other), STEPS - 5)
    assert all(rest[place] == key for place, key in expected.items() if place in rest and key != "000010004")
    assert "000010004" not in rest.values()
