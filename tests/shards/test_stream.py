"""The stream: every sample exactly once an epoch, at every world size, stopped and resumed anywhere."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import itertools
import logging
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from torch.utils.data import DataLoader

from infra.errors import UserError
from infra.storage import Folder
from shards.loader import Loader
from shards.mixed import MixedStream
from shards.stream import ShardStream

WORLDS = (1, 2, 3, 4, 6, 8)
BATCH, EPOCHS = 48, 2
Seen = dict[tuple[int, int, int], tuple[str, str]]
Corpus = Callable[..., Folder]


def fingerprint(sample: dict[str, Any]) -> tuple[str, str]:
    """A sample's key, and a digest of its payload."""
    payload = b"\0".join(name.encode() + sample[name] for name in ("jpg", "txt", "json"))
    return sample["__key__"], hashlib.sha256(payload).hexdigest()


def read(
    folder: Folder, world: int, state: dict[str, int] | None, steps: int | None, **options: Any
) -> tuple[Seen, dict[str, int]]:
    """Read `steps` steps (to the end by default) with every rank of a world; return what was seen, and the
    state.
    """
    seen: Seen = {}
    states = []
    for rank in range(world):
        stream = ShardStream(
            folder, global_batch_size=BATCH, rank=rank, world_size=world, epochs=EPOCHS, seed=5, **options
        )
        if state is not None:
            stream.load_state_dict(state)
        for number, batch in enumerate(stream):
            slots = [sample["__slot__"] for sample in batch]
            assert slots == sorted(slots)
            assert all(rank * BATCH // world <= slot < (rank + 1) * BATCH // world for slot in slots)
            for sample in batch:
                name = (sample["__epoch__"], sample["__step__"], sample["__slot__"])
                assert name not in seen
                seen[name] = fingerprint(sample)
            if steps is not None and number + 1 == steps:
                break
        states.append(stream.state_dict())
    assert all(one == states[0] for one in states)
    return seen, states[0]


@pytest.fixture(scope="module")
def corpus(shards_of: Corpus) -> Folder:
    return shards_of(210, 7, 333, 1, 180)


@pytest.mark.parametrize("remainder", ["drop", "keep", "pad"])
def test_audit_exactly_once_at_every_world_size(corpus: Folder, remainder: str) -> None:
    whole, _ = read(corpus, 1, None, None, remainder=remainder)
    samples = 210 + 7 + 333 + 1 + 180
    for epoch in range(EPOCHS):
        keys = [key for (of, _, _), (key, _) in whole.items() if of == epoch]
        if remainder == "pad":
            assert len(keys) == -(-samples // BATCH) * BATCH
            assert len(set(keys)) == samples
        else:
            expected = samples // BATCH * BATCH if remainder == "drop" else samples
            assert len(keys) == len(set(keys)) == expected
    for world in WORLDS[1:]:
        assert read(corpus, world, None, None, remainder=remainder)[0] == whole


@pytest.mark.parametrize("seed", range(4))
def test_audit_stopped_anywhere_and_resumed_with_another_world(corpus: Folder, seed: int) -> None:
    whole, end = read(corpus, 1, None, None)
    chance = random.Random(seed)
    seen: Seen = {}
    state = None
    while state is None or state["epoch"] < EPOCHS:
        world = chance.choice(WORLDS)
        part, state = read(corpus, world, state, chance.randint(1, 9))
        assert not part.keys() & seen.keys()
        seen |= part
    assert seen == whole
    assert state == end
    assert read(corpus, 2, end, None)[0] == {}


def test_small_windows_blocks_and_read_ahead_change_only_what_they_say(corpus: Folder) -> None:
    whole, _ = read(corpus, 1, None, None)
    assert read(corpus, 4, None, None, read_ahead_bytes=1, read_threads=1)[0] == whole
    other, _ = read(corpus, 1, None, None, block_samples=64, window_blocks=2, lanes=6)
    assert other.keys() == whole.keys()
    assert other != whole
    assert read(corpus, 3, None, None, block_samples=64, window_blocks=2, lanes=6)[0] == other


def test_length_and_passes(corpus: Folder) -> None:
    stream = ShardStream(corpus, global_batch_size=64, epochs=2)
    assert len(stream) == 2 * (731 // 64) == 2 * stream.steps_per_epoch
    first = [sample["__index__"] for sample in stream.samples()]
    assert len(first) == len(stream) * 64
    # Iterated again, it goes on with the epochs after these: no `set_epoch` is needed.
    assert {sample["__epoch__"] for sample in stream.samples()} == {2, 3}
    assert stream.state_dict()["epoch"] == 4


@pytest.mark.parametrize("travels", [copy.deepcopy, lambda stream: pickle.loads(pickle.dumps(stream))])  # noqa: S301
def test_a_copy_goes_on_with_the_next_epochs_too(corpus: Folder, travels: Any) -> None:
    loader = DataLoader(travels(ShardStream(corpus, global_batch_size=64)), batch_size=None, num_workers=2)
    assert [{sample["__epoch__"] for batch in loader for sample in batch} for _ in range(3)] == [{0}, {1}, {2}]


@pytest.mark.parametrize("taken", [1, 67, 128, 704, 705])
def test_samples_stopped_anywhere_and_resumed_miss_none(corpus: Folder, taken: int) -> None:
    def stream() -> ShardStream:
        return ShardStream(corpus, global_batch_size=64, epochs=2)

    whole = [(sample["__epoch__"], sample["__index__"]) for sample in stream().samples()]
    stopped = stream()
    seen = [(sample["__epoch__"], sample["__index__"]) for sample in itertools.islice(stopped.samples(), taken)]
    assert seen == whole[:taken]
    other = stream()
    other.load_state_dict(stopped.state_dict())
    for one in (other, stopped):
        rest = [(sample["__epoch__"], sample["__index__"]) for sample in one.samples()]
        assert rest == whole[taken // 64 * 64 :]  # the batch that was begun, from its first sample


def test_state_is_a_few_whole_numbers_of_one_corpus(corpus: Folder, shards_of: Corpus) -> None:
    stream = ShardStream(corpus, global_batch_size=64, lanes=8, seed=3)
    next(iter(stream))
    state = stream.state_dict()
    assert state["seed"] == 3
    assert (state["epoch"], state["step"]) == (0, 1)
    assert all(type(value) is int for value in state.values())
    with pytest.raises(UserError, match="global batch: 64 there, 32 now"):
        ShardStream(corpus, global_batch_size=32).load_state_dict(state)
    with pytest.raises(UserError, match="731 there, 100 now"):
        ShardStream(shards_of(100), global_batch_size=64).load_state_dict(state)
    with pytest.raises(UserError, match="64 in 8 lanes cannot be shared by 16"):
        ShardStream(corpus, global_batch_size=64, world_size=16).load_state_dict(state)
    # Lanes and seed come with the state.
    other = ShardStream(corpus, global_batch_size=64)
    other.load_state_dict(state)
    assert [s["__index__"] for s in next(iter(other))] == [s["__index__"] for s in next(iter(stream))]


def test_a_state_that_is_none_changes_nothing(corpus: Folder) -> None:
    stream = ShardStream(corpus, global_batch_size=64, seed=5)
    good = stream.state_dict()
    steps = stream.steps_per_epoch
    for wrong, words in (
        ({}, "it has no 'seed'"),
        ({name: value for name, value in good.items() if name != "lanes"}, "it has no 'lanes'"),
        (good | {"step": "3"}, "step: '3' is no whole number"),
        (good | {"step": 10**6}, f"step 1000000 of epoch 0, .* have {steps} steps"),
        (good | {"step": -3}, "step -3 of epoch 0"),
        (good | {"epoch": -1}, "step 0 of epoch -1"),
        (good | {"lanes": 7}, "7 do not divide"),
        (ShardStream(corpus, global_batch_size=64, remainder="keep").state_dict(), "another remainder than 'drop'"),
        (MixedStream([(corpus, 1.0)], global_batch_size=64).state_dict(), "it has no 'samples'"),
    ):
        with pytest.raises(UserError, match=words):
            stream.load_state_dict(wrong)
        assert stream.state_dict() == good
    narrow = ShardStream(corpus, global_batch_size=64, world_size=8)
    before = narrow.state_dict()
    with pytest.raises(UserError, match="64 in 4 lanes cannot be shared by 8"):
        narrow.load_state_dict(good | {"lanes": 4})
    assert narrow.state_dict() == before
    older = {name: value for name, value in good.items() if name != "remainder"}
    stream.load_state_dict(older | {"step": steps})
    assert (stream.state_dict()["epoch"], stream.state_dict()["step"]) == (1, 0)


def test_world_that_does_not_divide_is_the_users_mistake(corpus: Folder) -> None:
    with pytest.raises(UserError, match="cannot be shared by 5 ranks"):
        ShardStream(corpus, global_batch_size=64, world_size=5)
    with pytest.raises(UserError, match="rank 2 of 2"):
        ShardStream(corpus, global_batch_size=64, world_size=2, rank=2)
    with pytest.raises(UserError, match="no shards here"):
        ShardStream(corpus / "nothing", global_batch_size=64)


def test_samples_are_webdatasets_own(corpus: Folder) -> None:
    url = corpus.path("{00000..00004}.tar")
    plain = {sample["__key__"]: sample for sample in wds.WebDataset(url, shardshuffle=False)}
    assert len(plain) == 731
    stream = ShardStream(corpus, global_batch_size=8, remainder="keep")
    for sample in stream.samples():
        ours = {name: value for name, value in sample.items() if not name.startswith("__")}
        theirs = plain[sample["__key__"]]
        assert ours == {name: value for name, value in theirs.items() if not name.startswith("__")}
        assert sample["__url__"] == theirs["__url__"]


def test_after_the_source_it_is_a_webdataset_pipeline(corpus: Folder) -> None:
    stream = ShardStream(corpus, global_batch_size=32, decode=True)
    pipeline = wds.DataPipeline(
        stream.source(), wds.to_tuple("jpg", "txt"), wds.map_tuple(np.mean, len), wds.batched(10)
    )
    means, lengths = next(iter(pipeline))
    assert len(means) == len(lengths) == 10
    raw = ShardStream(corpus, global_batch_size=32)
    decoded = wds.DataPipeline(raw.source(), wds.decode("rgb8"), wds.to_tuple("jpg", "txt", "json"))
    image, caption, facts = next(iter(decoded))
    ours = next(ShardStream(corpus, global_batch_size=32, decode=True).samples())
    assert (image == ours["jpg"]).all()
    assert ours["jpg"].dtype == np.uint8
    assert ours["jpg"].shape == (8, 8, 3)
    assert caption == ours["txt"] == ours["json"]["caption"] == facts["caption"]


def test_the_first_batch_does_not_wait_for_pandas(corpus: Folder) -> None:
    """pyarrow imports it, where there is one, to make a numpy array: a second of every start."""
    script = (
        "import sys; from shards.stream import ShardStream; "
        f"next(iter(ShardStream({corpus.url!r}, global_batch_size=24))); "
        "sys.exit('pandas' in sys.modules)"
    )
    assert importlib.util.find_spec("pandas") is not None
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("how", ["islice", "zip", "loader"])
def test_who_counts_the_batches_gets_the_next_epoch(corpus: Folder, how: str) -> None:
    stream = ShardStream(corpus, global_batch_size=64)
    batches = Loader(stream) if how == "loader" else stream
    for epoch in range(3):
        if how == "zip":
            taken = [batch for _, batch in zip(range(len(stream)), batches, strict=False)]
        else:
            taken = list(itertools.islice(batches, len(stream)))
        assert [sample["__epoch__"] for batch in taken for sample in batch] == [epoch] * (len(stream) * 64)


def test_a_state_at_the_end_says_that_nothing_is_left(corpus: Folder, caplog: pytest.LogCaptureFixture) -> None:
    stream = ShardStream(corpus, global_batch_size=64)
    list(stream)
    other = ShardStream(corpus, global_batch_size=64)
    other.load_state_dict(stream.state_dict())
    with caplog.at_level(logging.WARNING, logger="pairmill"):
        assert list(other) == []
    assert "nothing is left" in caplog.text
    assert {sample["__epoch__"] for sample in other.samples()} == {1}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("persistent", [False, True])
def test_a_plain_loader_goes_on_with_the_next_epoch(corpus: Folder, workers: int, persistent: bool) -> None:
    stream = ShardStream(corpus, global_batch_size=64)
    loader = DataLoader(stream, batch_size=None, num_workers=workers, persistent_workers=persistent)
    seen = []
    for epoch in range(3):
        samples = [sample for part in loader for sample in part]
        assert {sample["__epoch__"] for sample in samples} == {epoch}
        seen += [(sample["__epoch__"], sample["__step__"], sample["__slot__"]) for sample in samples]
    assert len(seen) == len(set(seen)) == 3 * len(stream) * 64


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"needs": "txt"}, r"needs: 'txt'; give a tuple of members, \('txt',\)"),
        ({"read_threads": 0}, "read_threads 0: give 0 or more to decode, 1 or more to read"),
        ({"decode_threads": -1}, "decode_threads -1, read_threads 8"),
        ({"lanes": 0}, "lanes: 0; give 1 or more"),
        ({"block_samples": 0}, "block_samples: 0; give 1 or more"),
        ({"cache_folder": "s3://bucket/cache"}, "cache_folder: s3://bucket/cache: give a folder on a local disk"),
    ],
)
def test_options_that_cannot_be_are_the_users_mistake(corpus: Folder, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        ShardStream(corpus, global_batch_size=64, **options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"seed": None}, "seed: None; give a whole number"),
        ({"global_batch_size": 8.0}, "global_batch_size: 8.0; give a whole number"),
        ({"rank": "0"}, "rank: '0'; give a whole number"),
        ({"lanes": 2.5}, "lanes: 2.5; give a whole number"),
        ({"keep": ["000000001"]}, "keep: a list; give a file of keys, or a KeepList"),
        ({"decode": "pil"}, "decode: 'pil'; give True, False, or a function"),
        ({"cache_folder": ""}, "cache_folder: '' names no folder"),
    ],
)
def test_plain_mistakes_are_named(corpus: Folder, options: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        ShardStream(corpus, **{"global_batch_size": 8, **options})


def test_numbers_of_numpy_are_numbers(corpus: Folder) -> None:
    stream = ShardStream(corpus, global_batch_size=np.int64(64), seed=np.int64(3), lanes=np.int32(8), needs=["txt"])  # type: ignore[arg-type]
    assert all(type(value) is int for value in stream.state_dict().values())
    assert len(next(iter(stream))) == 64
