"""Batches and augmentation: the same at every world size, resumable, and what bad input says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from infra.storage import Folder
from shards import index
from shards.reads import Reader
from shards.sample import IMAGES
from tests.shards.conftest import jpeg, write_shards
from train.augment import AugmentConfig, augment, crop_box, draws, normalise
from train.config import RunConfig
from train.data import Batch, PairReader, captions, shuffled
from train.tokenizer import CorpusTokenizer

STRONG = AugmentConfig(
    flip=0.5,
    rotation_degrees=30,
    margin=0.3,
    brightness=0.4,
    contrast=0.4,
    saturation=0.5,
    hue_degrees=40,
    grey=0.2,
    blur=0.5,
    erase=0.5,
)
MakeConfig = Callable[..., RunConfig]


def reader(config: RunConfig, rank: int = 0, world_size: int = 1) -> PairReader:
    """A rank's batches."""
    tokenizer = CorpusTokenizer.train(captions(config.data.folder), 320)
    return PairReader(config.data, config.augment, tokenizer, 16, rank=rank, world_size=world_size)


def take(source: PairReader, steps: int) -> list[Batch]:
    """The next batches; the reader's thread is ended."""
    batches = iter(source)
    taken = [next(batches) for _ in range(steps)]
    batches.close()  # type: ignore[attr-defined]
    return taken


def test_draws_are_uniform_and_belong_to_the_key() -> None:
    """A row depends on seed, epoch and its key alone."""
    keys = [f"{number:09d}" for number in range(2000)]
    together = draws(1, 2, keys)
    assert together.min() >= 0
    assert together.max() < 1
    assert abs(together.mean() - 0.5) < 0.01
    assert np.abs(np.corrcoef(together.T) - np.eye(together.shape[1])).max() < 0.1
    assert (draws(1, 2, keys[7:8]) == together[7:8]).all()
    assert (draws(1, 3, keys[7:8]) != together[7:8]).all()
    assert (draws(2, 2, keys[7:8]) != together[7:8]).all()


def test_augmentation_of_a_sample_does_not_depend_on_its_batch() -> None:
    """Alone or among others, the same picture comes out."""
    images = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8)
    numbers = torch.from_numpy(draws(0, 0, [str(number) for number in range(12)]))
    together = augment(images, numbers, STRONG)
    alone = torch.cat([augment(images[k : k + 1], numbers[k : k + 1], STRONG) for k in range(12)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert not torch.allclose(together, normalise(images))


def test_no_augmentation_is_normalisation() -> None:
    """With everything at 0 the picture is only normalised."""
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(
        augment(images, torch.rand(4, 24), AugmentConfig()), normalise(images), rtol=0, atol=1e-5
    )


def test_white_can_be_kept_white() -> None:
    """`keep_white`: colours move, the ground does not."""
    white = torch.full((8, 3, 4, 4), 255, dtype=torch.uint8)
    config = STRONG.model_copy(update={"keep_white": True, "erase": 0.0})
    torch.testing.assert_close(augment(white, torch.rand(8, 24), config), normalise(white), rtol=0, atol=1e-4)


def test_crops_stay_inside() -> None:
    """Every box lies in the picture and has about the area asked for."""
    config = AugmentConfig(crop_scale=(0.5, 0.9))
    for numbers in draws(0, 0, [str(number) for number in range(200)]):
        left, upper, right, lower = crop_box((60, 40), numbers, config)
        assert 0 <= left < right <= 60 + 1e-6
        assert 0 <= upper < lower <= 40 + 1e-6
        assert (right - left) * (lower - upper) <= 0.91 * 2400


def test_a_margin_is_white_and_part_of_what_is_cropped(make_config: MakeConfig) -> None:
    """Whole crops of framed pictures have a white rim; the same without a margin have not."""
    whole = {"crop_scale": [1.0, 1.0], "crop_ratio": [1.0, 1.0]}
    framed = take(reader(make_config(augment={**whole, "margin": 0.5})), 1)[0].images
    plain = take(reader(make_config(augment=whole)), 1)[0].images
    rim = framed.clone()
    rim[:, :, 3:-3, 3:-3] = 255
    assert (rim == 255).all()
    assert not torch.equal(framed, plain)


@pytest.mark.parametrize("world_size", [2, 4])
def test_batches_do_not_depend_on_world_size_or_threads(make_config: MakeConfig, world_size: int) -> None:
    """The ranks' parts, put together, are one process' batches to the bit, over the end of an epoch."""
    alone = take(reader(make_config()), 8)
    config = make_config(data={"threads": 3, "prefetch": 1, "cache_bytes": 5000})
    parts = [take(reader(config, rank, world_size), 8) for rank in range(world_size)]
    for step, batch in enumerate(alone):
        assert sum((part[step].keys for part in parts), ()) == batch.keys
        assert torch.equal(torch.cat([part[step].images for part in parts]), batch.images)
        assert torch.equal(torch.cat([part[step].numbers for part in parts]), batch.numbers)


@pytest.mark.parametrize("decoder", ["pillow", "turbo"])
def test_loader_processes_bring_the_same_batches(make_config: MakeConfig, decoder: str) -> None:
    """Prepared by two processes, from the middle of the run on, batches are those of the rank's own threads."""
    strong = {"augment": STRONG.model_dump(), "data": {"early_image_size": 8, "decoder": decoder}}
    alone = reader(make_config(**strong))
    processes = reader(make_config(**{**strong, "data": {**strong["data"], "workers": 2}}))
    alone.total = processes.total = 6 * 16
    torch.manual_seed(1)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    expected = take(alone, 7)
    processes.load_state_dict(expected[0].state)
    for batch, wanted in zip(take(processes, 6), expected[1:], strict=True):
        assert (batch.keys, batch.state) == (wanted.keys, wanted.state)
        assert torch.equal(batch.images, wanted.images)
        assert torch.equal(batch.tokens, wanted.tokens)
        assert torch.equal(batch.numbers, wanted.numbers)
    assert torch.equal(torch.rand(1), drawn)  # what dropout draws is left alone


def test_what_was_prepared_ahead_is_not_lost(make_config: MakeConfig) -> None:
    """A second iteration goes on after the last batch handed out, not after the last one prepared."""
    expected, source = take(reader(make_config()), 5), reader(make_config())
    found = take(source, 2) + take(source, 3)
    assert [batch.keys for batch in found] == [batch.keys for batch in expected]


def test_reader_resumes_at_another_world_size(make_config: MakeConfig) -> None:
    """State after 4 steps of one process, taken over by two."""
    first = reader(make_config())
    expected = take(reader(make_config()), 9)[4:]
    taken = take(first, 4)
    assert first.state_dict() == taken[-1].state
    parts = []
    for rank in range(2):
        part = reader(make_config(), rank, 2)
        part.load_state_dict(first.state_dict())
        parts.append(take(part, 5))
    for step, batch in enumerate(expected):
        assert parts[0][step].keys + parts[1][step].keys == batch.keys


def test_epochs_crop_differently(make_config: MakeConfig) -> None:
    """A sample seen again is not cropped as before."""
    source = reader(make_config())
    steps = source.stream.steps_per_epoch
    seen: dict[str, torch.Tensor] = {}
    again = [
        (image, seen.setdefault(key, image))
        for batch in take(source, 2 * steps)
        for key, image in zip(batch.keys, batch.images, strict=True)
    ]
    repeated = [torch.equal(*pair) for pair in again if pair[0] is not pair[1]]
    assert len(repeated) > steps
    assert sum(repeated) < len(repeated) / 4


def test_smaller_pictures_come_first(make_config: MakeConfig) -> None:
    """`early_image_size` holds for its share of the run."""
    source = reader(make_config(data={"early_image_size": 8, "early_share": 0.5}))
    source.total = 6 * 16
    assert [batch.images.shape[-1] for batch in take(source, 6)] == [8, 8, 8, 16, 16, 16]


def test_shuffled_captions_are_a_permutation(make_config: MakeConfig) -> None:
    """The control experiment moves every caption somewhere, the same on every rank."""
    config = make_config(data={"shuffle_captions": True})
    texts = captions(config.data.folder)
    moved = shuffled(texts, config.data.seed)
    assert sorted(moved) == sorted(texts)
    assert sum(one == other for one, other in zip(moved, texts, strict=True)) < 10
    plain, control = take(reader(make_config()), 1)[0], take(reader(config), 1)[0]
    assert torch.equal(plain.images, control.images)
    assert not torch.equal(plain.tokens, control.tokens)


def test_captions_come_from_the_sidecars_where_they_are_the_tars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One folder read by its sidecars, by a tar where one is not that tar's, and by its tars alone."""
    folder = write_shards(Folder(tmp_path), [20, 30], fails_every=7)
    ranges: list[tuple[int, int]] = []
    read = Reader.read
    monkeypatch.setattr(Reader, "read", lambda own, *ends: ranges.append(ends) or read(own, *ends))
    texts = captions(folder.url)
    assert texts[:3] == [f"picture {row} of shard 0, señor" for row in (0, 2, 3)]  # row 1 is no sample
    assert len(texts) == 17 + 25
    assert captions(folder.url, 19) == texts[:19]
    assert not ranges
    index.save(folder, index.build(folder))
    table = pq.read_table(tmp_path / "00001.parquet")
    pq.write_table(table.slice(1), tmp_path / "00001.parquet")
    assert captions(folder.url) == texts
    assert ranges == [(17, 42)]
    (tmp_path / "00001.parquet").write_bytes(b"PAR1 and nothing more")
    assert captions(folder.url, 20) == texts[:20]
    assert ranges == [(17, 42), (17, 20)]
    for name in folder.names():
        if not name.endswith(".tar"):
            folder.delete(name)
    assert captions(folder.url) == texts


def test_any_jpeg_is_decoded_by_turbo_if_told(make_config: MakeConfig) -> None:
    """A member `jpeg` gives the crop that the same bytes give as `jpg`."""
    source = reader(make_config(data={"decoder": "turbo"}))
    source.stream.decode = False
    sample = next(source.stream.samples())
    body, by_name = jpeg(1), []
    for name in ("jpg", "jpeg"):
        one = {key: value for key, value in sample.items() if key not in IMAGES} | {name: body}
        source.preparation(one)
        by_name.append(one["crop"])
    assert np.array_equal(*by_name)
    assert "jpeg" not in one
