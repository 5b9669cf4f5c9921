"""Folders mixed by weight: the same samples in the same slots whoever reads, exactly once, resumable."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.errors import UserError
from infra.storage import Folder
from shards import order
from shards.kept import KeepList
from shards.loader import Loader
from shards.mixed import MixedStream, Source
from shards.stream import ShardStream

BATCH = 24
Corpus = Callable[..., Folder]
Seen = dict[tuple[int, int], tuple[int, int, str, bytes]]


@pytest.fixture(scope="module")
def sources(shards_of: Corpus) -> list[tuple[Folder, float]]:
    return [(shards_of(210, 7, 333, 1, 180), 3.0), (shards_of(70, 65), 1.0)]


def see(batches: Any, seen: Seen, steps: int | None = None) -> None:
    """Note what batches hold, by step and slot; `steps` of them, all by default."""
    for number, batch in enumerate(batches):
        slots = [sample["__slot__"] for sample in batch]
        assert slots == sorted(slots)
        for sample in batch:
            name = (sample["__step__"], sample["__slot__"])
            assert name not in seen
            seen[name] = (sample["__corpus__"], sample["__epoch__"], sample["__key__"], sample["jpg"])
        if steps is not None and number + 1 == steps:
            return


def read(sources: list[tuple[Folder, float]], world: int, workers: int = 0, **options: Any) -> Seen:
    """What all ranks of a world see in one epoch of the mix."""
    seen: Seen = {}
    for rank in range(world):
        stream = MixedStream(sources, global_batch_size=BATCH, rank=rank, world_size=world, seed=3, **options)
        see(Loader(stream, workers=workers) if workers else stream, seen)
    return seen


def test_every_world_sees_the_same(sources: list[tuple[Folder, float]]) -> None:
    whole = read(sources, 1)
    assert len(whole) == (731 + 135) // BATCH * BATCH
    for world in (2, 3, 8):
        assert read(sources, world) == whole
    assert read(sources, 2, workers=3) == whole
    assert read(sources, 1, decode_threads=2, read_ahead_bytes=1) == whole


def test_shares_and_epochs_of_each_folder(sources: list[tuple[Folder, float]]) -> None:
    stream = MixedStream(sources, global_batch_size=BATCH, seed=1, epochs=4)
    counts: Counter[int] = Counter()
    once: Counter[tuple[int, int, str]] = Counter()
    for batch in stream:
        in_batch = Counter(sample["__corpus__"] for sample in batch)
        assert abs(in_batch[0] - BATCH * 0.75) <= 3
        counts.update(in_batch)
        once.update((sample["__corpus__"], sample["__epoch__"], sample["__key__"]) for sample in batch)
    assert counts[0] / counts.total() == pytest.approx(0.75, abs=0.005)
    assert max(once.values()) == 1
    assert max(epoch for corpus, epoch, _ in once if corpus == 1) >= 5  # the small folder, again and again
    assert len(stream) == 4 * ((731 + 135) // BATCH)


def test_stopped_and_resumed_with_another_world(sources: list[tuple[Folder, float]]) -> None:
    whole = read(sources, 1)
    seen: Seen = {}
    state = None
    for world, steps in ((2, 7), (3, 11), (1, 100)):
        for rank in range(world):
            stream = MixedStream(sources, global_batch_size=BATCH, rank=rank, world_size=world, seed=0)
            stream.load_state_dict(state or MixedStream(sources, global_batch_size=BATCH, seed=3).state_dict())
            see(stream, seen, steps)
            after = stream.state_dict()
        state = after
    assert seen == whole
    assert state is not None
    assert all(type(value) is int for value in state.values())


def test_a_hole_is_filled_from_its_own_folder(
    sources: list[tuple[Folder, float]], own_shards: Folder, tmp_path: Path
) -> None:
    mixed = [sources[0], (own_shards, 1.0)]
    good = read(mixed, 1, patience_s=0.5)
    Path(own_shards.path("00001.tar")).unlink()
    found = read(mixed, 2, patience_s=0.5, skip_unreadable=True)
    assert found.keys() == good.keys()
    lost = {place for place, (corpus, _, key, _) in good.items() if corpus == 1 and key.startswith("00001")}
    assert lost
    assert {place: found[place] for place in good if place not in lost} == {
        place: good[place] for place in good if place not in lost
    }
    assert {found[place][0] for place in lost} == {1}


def test_what_does_not_work_out_is_the_users_mistake(sources: list[tuple[Folder, float]], shards_of: Corpus) -> None:
    with pytest.raises(UserError, match="a weight above 0"):
        MixedStream([(sources[0][0], 0.0)], global_batch_size=BATCH)
    with pytest.raises(UserError, match=r"fewer samples than the mix has lanes \(24\)"):
        MixedStream([sources[0], (shards_of(20), 1.0)], global_batch_size=BATCH)
    with pytest.raises(UserError, match="cannot be shared by 5 ranks"):
        MixedStream(sources, global_batch_size=BATCH, world_size=5)
    state = MixedStream(sources, global_batch_size=BATCH).state_dict()
    with pytest.raises(UserError, match=r"shares \[750, 250\] of a batch of 24 there, \[500, 500\] of 24 now"):
        MixedStream([(folder, 1.0) for folder, _ in sources], global_batch_size=BATCH).load_state_dict(state)
    with pytest.raises(UserError, match="samples in the corpus: 731 there, 135 now"):
        MixedStream([(sources[1][0], 3.0), sources[1]], global_batch_size=BATCH).load_state_dict(state)


def test_a_states_lanes_are_taken_over_and_a_state_that_is_none_changes_nothing(
    sources: list[tuple[Folder, float]],
) -> None:
    there = MixedStream(sources, global_batch_size=BATCH, seed=3, lanes=12)
    state = there.state_dict()
    seen: Seen = {}
    found: Seen = {}
    see(there, seen)
    stream = MixedStream(sources, global_batch_size=BATCH)
    before = stream.state_dict()
    for wrong, words in (
        (state | {"step": 37}, "step 37 of epoch 0, .* have 36 steps"),
        (state | {"epoch": None}, "epoch: None is no whole number"),
        (state | {"1.samples": 134}, "samples in the corpus: 134 there, 135 now"),
        (state | {"1.lanes": 6}, "lanes and batches differ"),
        (state | {"0.lanes": 7, "0.global_batch": 7, "1.lanes": 7, "1.global_batch": 7}, "7 lanes do not divide"),
        ({name: value for name, value in state.items() if name != "1.lanes"}, r"it has no '1\.lanes'"),
    ):
        with pytest.raises(UserError, match=words):
            stream.load_state_dict(wrong)
        assert stream.state_dict() == before
    stream.load_state_dict(state)
    see(stream, found)
    assert found == seen


def test_each_folder_has_its_own_keep_list(sources: list[tuple[Folder, float]]) -> None:
    keep = KeepList(range(0, 135, 2), 135)
    stream = MixedStream([sources[0], Source(*sources[1], keep=keep)], global_batch_size=BATCH)
    taken = [(sample["__corpus__"], sample["__index__"]) for sample in stream.samples()]
    assert {number % 2 for corpus, number in taken if corpus == 1} == {0}
    assert {number % 2 for corpus, number in taken if corpus == 0} == {0, 1}
    with pytest.raises(UserError, match="keep: each folder of a mix has its own"):
        MixedStream(sources, global_batch_size=BATCH, keep=keep)


def test_lanes_and_batches_that_do_not_work_out(sources: list[tuple[Folder, float]]) -> None:
    for options, words in (
        ({"global_batch_size": 10, "lanes": 4}, "4 do not divide the global batch of 10"),
        ({"global_batch_size": 10, "lanes": 0}, "0 do not divide the global batch of 10"),
        ({"global_batch_size": 1000, "lanes": 1}, "866 samples together, less than a global batch of 1000"),
        ({"global_batch_size": 10, "remainder": "keep"}, "remainder: a mix goes on"),
        ({"global_batch_size": 10, "decode_threads": -1}, "decode_threads -1"),
    ):
        with pytest.raises(UserError, match=words):
            MixedStream(sources, **options)


def test_what_an_epoch_leaves_out_is_said(
    sources: list[tuple[Folder, float]], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="pairmill"):
        MixedStream(sources, global_batch_size=72, lanes=3)
        assert not caplog.records
        MixedStream(sources, global_batch_size=72)
    assert sum("leaves out 63 of 135 samples" in record.getMessage() for record in caplog.records) == 1


def test_windows_share_the_memory_by_weight(
    sources: list[tuple[Folder, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order, "RESIDENT_BYTES_PER_SLOT", 300_000)
    mixed = MixedStream([(sources[0][0], weight) for weight in (3.0, 1.0)], global_batch_size=4, lanes=2)
    large, small = (stream.order.block_samples for stream in mixed.streams)
    assert large // small == 3
    alone = ShardStream(sources[0][0], global_batch_size=4, lanes=2).order.block_samples
    assert large + small <= alone


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("abc", "sources: 'abc'; give"),
        (("abc",), "give .folder, weight. or Source"),
        (("abc", "3"), "weight '3': give"),
    ],
)
def test_sources_that_are_none(given: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        MixedStream([given], global_batch_size=8)
