"""Exactly once an epoch, audited with processes that are killed and worlds that change.

One folder; a part of a folder; two folders mixed by weight, of one a part. The last two with damaged samples in them.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from infra.errors import RunError
from infra.storage import Folder
from shards import reads
from shards.batches import Batches
from shards.kept import KeepList
from shards.loader import Loader
from shards.mixed import MixedStream, Source
from shards.stream import ShardStream
from tests.shards.damaged import copy_with_holes

# Ranks are forked from one process that has imported what they need, since to import torch anew takes seconds; and not
# from this one, in which other tests have started threads.
RANKS = multiprocessing.get_context("forkserver")
RANKS.set_forkserver_preload([__name__])
BATCH, EPOCHS, SEED = 48, 2, 11
PATIENCE_S = 60
LARGE, SMALL = (210, 7, 333, 1, 180), (70, 65)
BAD = (4, 5, 6, 213, 400, 730)
BAD_OF_SMALL = (3, 70, 134)
KEPT = tuple(number for number in range(sum(LARGE)) if number % 3 != 2)
KEPT_OF_SMALL = tuple(number for number in range(sum(SMALL)) if number % 4 != 1)
Corpus = Callable[..., Folder]


class Place(NamedTuple):
    """What is audited of a sample: `epoch` is its folder's, `number` that of the hole where it stands in for one."""

    step: int
    slot: int
    corpus: int
    epoch: int
    number: int
    is_hole: bool
    key: str
    digest: str


Seen = tuple[int, Place]
"""The number of the batch in the run, and a sample of it."""


@dataclass(frozen=True)
class Audited:
    """A stream to audit: how a rank makes it, and which samples (corpus, number) of it are bad."""

    make: Callable[[int, int], Batches]
    """Picklable, as it goes to the ranks' processes."""
    bad: frozenset[tuple[int, int]] = frozenset()


@pytest.fixture(scope="module")
def audited(shards_of: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Audited]:
    large, small = shards_of(*LARGE), shards_of(*SMALL)
    torn = copy_with_holes(large, tmp_path_factory.mktemp("large"), BAD)
    torn_small = copy_with_holes(small, tmp_path_factory.mktemp("small"), BAD_OF_SMALL)
    keep = KeepList(KEPT, sum(LARGE))
    part = Source(torn_small, 1.0, keep=KeepList(KEPT_OF_SMALL, sum(SMALL)))

    return {
        "folder": Audited(partial(one_folder, large, None)),
        "keep list": Audited(
            partial(one_folder, torn, keep), frozenset((0, number) for number in set(BAD) & set(KEPT))
        ),
        "mix": Audited(
            partial(mixed, [(torn, 3.0), part]),
            frozenset({(0, number) for number in BAD} | {(1, number) for number in BAD_OF_SMALL}),
        ),
    }


def shared(rank: int, world: int) -> dict[str, int]:
    return {"global_batch_size": BATCH, "rank": rank, "world_size": world, "epochs": EPOCHS, "seed": SEED}


def one_folder(folder: Folder, keep: KeepList | None, rank: int, world: int) -> ShardStream:
    return ShardStream(folder, remainder="keep", keep=keep, **shared(rank, world))


def mixed(sources: list[Any], rank: int, world: int) -> MixedStream:
    return MixedStream(sources, **shared(rank, world))


def places(samples: list[dict[str, Any]]) -> list[Place]:
    """What is audited of each sample."""
    return [
        Place(
            sample["__step__"], sample["__slot__"], sample.get("__corpus__", 0), sample["__epoch__"],
            sample.get("__hole__", sample["__index__"]), "__hole__" in sample, sample["__key__"],
            hashlib.sha256(b"\0".join(sample[name] for name in ("jpg", "txt", "json"))).hexdigest(),
        )
        for sample in samples
    ]  # fmt: skip


def fingerprint(seen: list[Seen]) -> str:
    return hashlib.sha256(json.dumps(sorted(seen)).encode()).hexdigest()


def batches_done(stream: Batches) -> int:
    state = stream.state_dict()
    return state["epoch"] * stream.steps_per_epoch + state["step"]


def trainer(
    one: Audited, out: Path, rank: int, world: int, workers: int, last_step: int | None, pooled_from: int
) -> None:
    """One rank: writes what each step saw and the state after it, whole or not at all; dies in a step's midst."""
    multiprocessing.set_start_method("fork", force=True)  # what a rank's loader processes are started by otherwise
    reads.POOLED_FROM_BYTES = pooled_from
    stream = one.make(rank, world)
    if (out / "state.json").exists():
        stream.load_state_dict(json.loads((out / "state.json").read_text()))
    loader = Loader(stream, workers=workers, transform=places)
    for done, seen in enumerate(loader):
        if done == last_step:
            for child in psutil.Process().children():
                child.kill()
            os.kill(os.getpid(), signal.SIGKILL)
        path = out / f"{batches_done(stream) - 1:05d}-{rank}-of-{world}.json"
        path.with_suffix(".part").write_text(json.dumps({"seen": seen, "state": loader.state_dict()}))
        path.with_suffix(".part").rename(path)


def run_world(one: Audited, out: Path, world: int, workers: int, chance: random.Random | None) -> None:
    """Run all ranks, each killed in a step of its own; without `chance` to the end."""
    how = (world, workers)
    ranks = [
        RANKS.Process(
            target=trainer, args=(one, out, rank, *how, chance and chance.randint(1, 7), reads.POOLED_FROM_BYTES)
        )
        for rank in range(world)
    ]
    try:
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(PATIENCE_S)
            assert process.exitcode in (0, -signal.SIGKILL)
    finally:
        for process in ranks:
            process.kill()
            process.join()


def take_whole_steps(out: Path, world: int) -> list[Seen]:
    """Count the steps that every rank wrote down, the last of them being the checkpoint; drop what is beyond."""
    counted: list[Seen] = []
    for first in sorted(out.glob(f"*-0-of-{world}.json")):
        paths = [first.with_name(first.name.replace("-0-of-", f"-{rank}-of-")) for rank in range(world)]
        if not all(path.exists() for path in paths):
            break
        written = [json.loads(path.read_text()) for path in paths]
        assert all(one["state"] == written[0]["state"] for one in written)
        (out / "state.json").write_text(json.dumps(written[0]["state"]))
        batch = int(first.name.partition("-")[0])
        counted += [(batch, Place(*place)) for one in written for place in one["seen"]]
    for path in out.glob(f"*-of-{world}.*"):
        path.unlink()
    return counted


def check_once(one: Audited, whole: list[Seen]) -> None:
    """Every sample once an epoch of its folder, the bad ones in their places as holes."""
    stream = one.make(0, 1)
    assert [batch % stream.steps_per_epoch for batch, _ in whole] == [place.step for _, place in whole]
    assert len({(batch, place.slot) for batch, place in whole}) == len(whole)
    once = Counter((place.corpus, place.epoch, place.number) for _, place in whole)
    assert max(once.values()) == 1
    assert {(place.corpus, place.number) for _, place in whole if place.is_hole} == one.bad
    held = Counter((corpus, epoch) for corpus, epoch, _ in once)
    if isinstance(stream, MixedStream):
        assert held[0, 0] == sum(LARGE) // BATCH * BATCH
        assert [held[1, epoch] for epoch in range(4)] == [len(KEPT_OF_SMALL) // BATCH * BATCH] * 4
    else:
        kept = KEPT if stream.kept else range(sum(LARGE))
        assert held == dict.fromkeys([(0, epoch) for epoch in range(EPOCHS)], len(kept))
        assert {number for _, _, number in once} == set(kept)


@pytest.mark.parametrize(
    ("kind", "seed"),
    [("folder", 0), ("folder", 1), ("folder", 2), ("keep list", 0), ("keep list", 1), ("mix", 0), ("mix", 1)],
)
def test_killed_at_random_steps_and_resumed_in_another_world(
    audited: dict[str, Audited], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, seed: int
) -> None:
    one = audited[kind]
    whole = [(number, place) for number, batch in enumerate(one.make(0, 1)) for place in places(batch)]
    if seed:  # what was read plainly is audited against used buffers, which a fork takes over
        monkeypatch.setattr(reads, "POOLED_FROM_BYTES", 1)
    check_once(one, whole)
    chance = random.Random(seed)
    worlds = [1, 2, 3, 4, 6, 8]
    chance.shuffle(worlds)
    counted: list[Seen] = []
    for number, world in enumerate(worlds):
        # One world has loader processes, which die with their rank.
        run_world(one, tmp_path, world, 2 if number == seed else 0, chance)
        counted += take_whole_steps(tmp_path, world)
    last = worlds[seed - 1]
    run_world(one, tmp_path, last, 0, None)
    counted += take_whole_steps(tmp_path, last)
    assert len(counted) == len(set(counted)) == len(whole)
    assert fingerprint(counted) == fingerprint(whole)


def test_a_killed_loader_process_ends_the_run_and_the_rest_is_exact(audited: dict[str, Audited]) -> None:
    make = audited["folder"].make
    whole = [places(batch) for batch in make(0, 1)]
    loader = Loader(make(0, 1), workers=2, transform=places)
    seen = []

    def read_on() -> None:
        for batch in loader:
            seen.append(batch)
            if len(seen) == 1:  # most is still to be read: the processes are a few batches ahead
                multiprocessing.active_children()[-1].kill()

    # torch's own error may strike between two batches, in the midst of whatever runs then.
    with pytest.raises((RunError, RuntimeError), match=r"DataLoader worker \(pid"):
        read_on()
    assert 1 <= len(seen) < len(whole)
    again = Loader(make(0, 1), workers=3, transform=places)
    again.load_state_dict(loader.state_dict())
    assert seen + list(again) == whole
