"""Crops are the same pixels, sample by sample and slot by slot, whoever reads and decodes them, with holes too."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import webdataset as wds

from infra.storage import Folder
from shards.batches import Batches
from shards.loader import Loader
from shards.mixed import MixedStream
from shards.pictures import RandomCrop
from shards.stream import ShardStream
from tests.shards.damaged import copy_with_holes

BATCH, EPOCHS = 24, 2
PICTURE_BYTE = 512
CROP = RandomCrop(side=6, scale=(0.2, 0.8), flip=0.5, seed=9)
Pixels = dict[tuple[int, int], tuple[int, str, int, str]]
"""By the number of the batch in the run and slot: epoch, key, the hole stood in for or -1, digest of the pixels."""


@pytest.fixture(scope="module")
def folder(shards_of: Callable[..., Folder], tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """135 samples; one has a damaged header, two neighbours a picture that no decoder takes."""
    torn = copy_with_holes(shards_of(70, 65), tmp_path_factory.mktemp("torn"), [40])
    return copy_with_holes(torn, tmp_path_factory.mktemp("torn"), [69, 70], at=PICTURE_BYTE)


def stream_of(folder: Folder, rank: int = 0, world: int = 1, threads: int = 0) -> ShardStream:
    return ShardStream(
        folder, global_batch_size=BATCH, rank=rank, world_size=world, epochs=EPOCHS, seed=2, remainder="keep",
        decode=CROP, decode_threads=threads,
    )  # fmt: skip


def seen_in(sample: dict[str, Any]) -> tuple[int, int, tuple[int, str, int, str]]:
    """Step, slot, and what is compared of a sample."""
    assert sample["jpg"].shape == (6, 6, 3)
    digest = hashlib.sha256(sample["jpg"].tobytes()).hexdigest()
    found = (sample["__epoch__"], sample["__key__"], sample.get("__hole__", -1), digest)
    return sample["__step__"], sample["__slot__"], found


def all_seen(samples: list[dict[str, Any]]) -> list[tuple[int, int, tuple[int, str, int, str]]]:
    return [seen_in(sample) for sample in samples]


def gathered(batches: Iterator[Any], pixels: Pixels) -> None:
    for number, batch in enumerate(batches):
        for _, slot, found in batch:
            assert (number, slot) not in pixels
            pixels[number, slot] = found


def pixels_of(make: Callable[[int, int, int], Batches], world: int, workers: int, threads: int) -> Pixels:
    """What all ranks of a world see, with so many loader workers, and decoding threads in each."""
    pixels: Pixels = {}
    for rank in range(world):
        gathered(iter(Loader(make(rank, world, threads), workers=workers, transform=all_seen)), pixels)
    return pixels


def test_the_reference_has_crops_flips_and_holes(folder: Folder) -> None:
    whole = pixels_of(lambda *of: stream_of(folder, *of), 1, 0, 0)
    assert len(whole) == EPOCHS * 135
    assert sorted(hole for _, _, hole, _ in whole.values() if hole >= 0) == [40, 40, 69, 69, 70, 70]
    of_epoch = [{key: digest for epoch, key, _, digest in whole.values() if epoch == one} for one in range(EPOCHS)]
    assert of_epoch[0].keys() == of_epoch[1].keys()
    assert not set(of_epoch[0].values()) & set(of_epoch[1].values())
    # A stand-in is cropped as it is in its own place.
    assert len({(epoch, key, digest) for epoch, key, _, digest in whole.values()}) == EPOCHS * (135 - 3)


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 3])
def test_every_world_worker_and_thread_sees_the_same_pixels(
    folder: Folder, world: int, workers: int, threads: int
) -> None:
    def make(*of: int) -> ShardStream:
        return stream_of(folder, *of)

    assert pixels_of(make, world, workers, threads) == pixels_of(make, 1, 0, 0)


@pytest.mark.parametrize(("workers", "threads"), [(0, 3), (2, 0)])
def test_a_mix_sees_the_same_pixels(
    folder: Folder, shards_of: Callable[..., Folder], workers: int, threads: int
) -> None:
    sources = [(folder, 1.0), (shards_of(40, 30, 26), 2.0)]

    def make(rank: int, world: int, threads: int) -> MixedStream:
        return MixedStream(
            sources, global_batch_size=BATCH, rank=rank, world_size=world, epochs=EPOCHS, seed=2, lanes=12,
            decode=CROP, decode_threads=threads,
        )  # fmt: skip

    whole = pixels_of(make, 1, 0, 0)
    assert len({epoch for epoch, *_ in whole.values()}) > EPOCHS  # the smaller folder is gone through more often
    assert any(hole >= 0 for _, _, hole, _ in whole.values())
    assert pixels_of(make, 2, workers, threads) == whole


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_webdataset_pipeline_sees_the_same_pixels(folder: Folder, workers: int, threads: int) -> None:
    whole = pixels_of(lambda *of: stream_of(folder, *of), 1, 0, 0)
    steps = stream_of(folder).steps_per_epoch
    found: Pixels = {}
    for rank in range(2):
        pipeline = wds.DataPipeline(stream_of(folder, rank, 2, threads).source(), wds.map(seen_in))
        samples = wds.WebLoader(pipeline, batch_size=None, num_workers=workers) if workers else pipeline
        for step, slot, one in samples:
            name = (one[0] * steps + step, slot)
            assert name not in found
            found[name] = tuple(one)  # torch makes lists of tuples
    assert found == whole


def test_crops_resume_in_mid_epoch_under_other_workers(folder: Folder) -> None:
    whole = [all_seen(batch) for batch in stream_of(folder)]
    loader = Loader(stream_of(folder, threads=3), transform=all_seen)
    batches = iter(loader)
    seen = [next(batches) for _ in range(7)]
    state = loader.state_dict()
    batches.close()
    other = Loader(stream_of(folder), workers=2, transform=all_seen)
    other.load_state_dict(state)
    assert seen + list(other) == whole
