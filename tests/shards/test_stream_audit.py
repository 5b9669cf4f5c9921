"""Exactly once an epoch, audited with processes that are killed and worlds that change."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra.errors import RunError
from infra.storage import Folder
from shards.loader import Loader
from shards.stream import ShardStream

# Forked, since a process that imports torch anew takes seconds; nothing here starts threads before.
FORK = multiprocessing.get_context("fork")
BATCH, EPOCHS, SEED = 48, 2, 11
PATIENCE_S = 60
Place = tuple[int, int, int, str, str]
Corpus = Callable[..., Folder]


@pytest.fixture(scope="module")
def corpus(shards_of: Corpus) -> Folder:
    return shards_of(210, 7, 333, 1, 180)


def stream_of(folder: str, rank: int = 0, world: int = 1) -> ShardStream:
    return ShardStream(
        folder, global_batch_size=BATCH, rank=rank, world_size=world, epochs=EPOCHS, seed=SEED, remainder="keep"
    )


def places(samples: list[dict[str, Any]]) -> list[Place]:
    """What is audited of each sample: epoch, step, slot, key and a digest of its payload."""
    return [
        (
            sample["__epoch__"], sample["__step__"], sample["__slot__"], sample["__key__"],
            hashlib.sha256(b"\0".join(sample[name] for name in ("jpg", "txt", "json"))).hexdigest(),
        )
        for sample in samples
    ]  # fmt: skip


def fingerprint(seen: list[Place]) -> str:
    return hashlib.sha256(json.dumps(sorted(seen)).encode()).hexdigest()


def trainer(folder: str, out: Path, rank: int, world: int, workers: int, last_step: int | None) -> None:
    """One rank: writes what each step saw and the state after it, whole or not at all; dies in a step's midst."""
    stream = stream_of(folder, rank, world)
    if (out / "state.json").exists():
        stream.load_state_dict(json.loads((out / "state.json").read_text()))
    loader = Loader(stream, workers=workers, transform=places)
    for done, seen in enumerate(loader):
        if done == last_step:
            for child in psutil.Process().children():
                child.kill()
            os.kill(os.getpid(), signal.SIGKILL)
        epoch, step = seen[0][:2]
        path = out / f"{epoch:03d}-{step:05d}-{rank}-of-{world}.json"
        path.with_suffix(".part").write_text(json.dumps({"seen": seen, "state": loader.state_dict()}))
        path.with_suffix(".part").rename(path)


def run_world(folder: str, out: Path, world: int, workers: int, chance: random.Random | None) -> None:
    """Run all ranks, each killed in a step of its own; without `chance` to the end."""
    ranks = [
        FORK.Process(target=trainer, args=(folder, out, rank, world, workers, chance and chance.randint(1, 7)))
        for rank in range(world)
    ]
    try:
        for one in ranks:
            one.start()
        for one in ranks:
            one.join(PATIENCE_S)
            assert one.exitcode in (0, -signal.SIGKILL)
    finally:
        for one in ranks:
            one.kill()
            one.join()


def take_whole_steps(out: Path, world: int) -> list[Place]:
    """Count the steps that every rank wrote down, the last of them being the checkpoint; drop what is beyond."""
    counted: list[Place] = []
    for first in sorted(out.glob(f"*-0-of-{world}.json")):
        paths = [first.with_name(first.name.replace("-0-of-", f"-{rank}-of-")) for rank in range(world)]
        if not all(path.exists() for path in paths):
            break
        written = [json.loads(path.read_text()) for path in paths]
        assert all(one["state"] == written[0]["state"] for one in written)
        (out / "state.json").write_text(json.dumps(written[0]["state"]))
        counted += [tuple(place) for one in written for place in one["seen"]]
    for path in out.glob(f"*-of-{world}.*"):
        path.unlink()
    return counted


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_steps_and_resumed_in_another_world(corpus: Folder, tmp_path: Path, seed: int) -> None:
    whole = [place for batch in stream_of(corpus.url) for place in places(batch)]
    assert len(whole) == EPOCHS * 731
    chance = random.Random(seed)
    worlds = [1, 2, 3, 4, 6, 8]
    chance.shuffle(worlds)
    counted: list[Place] = []
    for number, world in enumerate(worlds):
        # One world has loader processes, which die with their rank.
        run_world(corpus.url, tmp_path, world, 2 if number == seed else 0, chance)
        counted += take_whole_steps(tmp_path, world)
    last = worlds[seed - 1]
    run_world(corpus.url, tmp_path, last, 0, None)
    counted += take_whole_steps(tmp_path, last)
    assert len(counted) == len(set(counted)) == len(whole)
    assert fingerprint(counted) == fingerprint(whole)
    for epoch in range(EPOCHS):
        assert len({key for of, _, _, key, _ in counted if of == epoch}) == 731


def test_a_killed_loader_process_ends_the_run_and_the_rest_is_exact(corpus: Folder) -> None:
    whole = [places(batch) for batch in stream_of(corpus.url)]
    loader = Loader(stream_of(corpus.url), workers=2, transform=places)
    seen = []

    def read_on() -> None:
        for batch in loader:
            seen.append(batch)
            if len(seen) == 1:  # most is still to be read: the processes are a few batches ahead
                children = [one for one in psutil.Process().children() if one.status() != psutil.STATUS_ZOMBIE]
                children[-1].kill()

    # torch's own error may strike between two batches, in the midst of whatever runs then.
    with pytest.raises((RunError, RuntimeError), match=r"DataLoader worker \(pid"):
        read_on()
    assert 1 <= len(seen) < len(whole)
    again = Loader(stream_of(corpus.url), workers=3, transform=places)
    again.load_state_dict(loader.state_dict())
    assert seen + list(again) == whole
