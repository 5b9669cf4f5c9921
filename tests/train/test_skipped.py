"""Samples that cannot be used: counted, named, and others in their place, the same at every world size."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from infra.errors import RunError
from infra.storage import Folder
from shards.index import build, save
from shards.tar import END, header, padded
from train.config import RunConfig
from train.data import Batch, PairReader, captions
from train.launch import train
from train.tokenizer import CorpusTokenizer

MakeConfig = Callable[..., RunConfig]
Drawing = Callable[[str, str, int], bytes]
SAMPLES, BATCH = 96, 16
UNDECODABLE, HEADLESS = (5, 6, 40), 77
"""Samples whose picture is none (two of them side by side), and one whose header is damaged."""


def write(folder: Path, drawing: Drawing, undecodable: Sequence[int] = (), headless: int | None = None) -> Path:
    """A shard of drawings; pictures of `undecodable` are cut short."""
    target = Folder(folder)
    with target.create("00000.tar") as tar:
        for number in range(SAMPLES):
            picture = drawing("red", "circle", number)
            if number in undecodable:
                picture = picture[: len(picture) // 2]
            for name, data in (("png", picture), ("txt", b"a red circle, number %d" % number)):
                tar.write(header(f"{number:09d}.{name}", len(data)) + data + bytes(padded(len(data)) - len(data)))
        tar.write(END)
    save(target, build(target))
    if headless is not None:
        path, key = Path(target.path("00000.tar")), b"%09d.png" % headless
        path.write_bytes(path.read_bytes().replace(key, b"x" + key[1:]))  # the header's checksum no longer holds
    return folder


@pytest.fixture
def sound(tmp_path: Path, drawing: Drawing) -> Path:
    return write(tmp_path / "sound", drawing)


@pytest.fixture
def bad(tmp_path: Path, drawing: Drawing) -> Path:
    return write(tmp_path / "bad", drawing, UNDECODABLE, HEADLESS)


def batches(config: RunConfig, steps: int, rank: int = 0, world_size: int = 1) -> list[Batch]:
    tokenizer = CorpusTokenizer.train(captions(config.data.folder), 320)
    source = PairReader(config.data, config.augment, tokenizer, 16, rank=rank, world_size=world_size)
    iterator = iter(source)
    taken = [next(iterator) for _ in range(steps)]
    iterator.close()  # type: ignore[attr-defined]
    assert source.skipped == [number for batch in taken for number in batch.skipped]
    return taken


def test_another_stands_in_and_nobody_moves(sound: Path, bad: Path, make_config: MakeConfig) -> None:
    steps = SAMPLES // BATCH
    good = batches(make_config(data={"folder": str(sound), "seed": 3}), steps)
    config = make_config(data={"folder": str(bad), "seed": 3})
    found = batches(config, steps)
    skipped = sorted(number for batch in found for number in batch.skipped)
    assert skipped == sorted({*UNDECODABLE, HEADLESS})
    wanted = [key for batch in good for key in batch.keys]
    filled = [key for batch in found for key in batch.keys]
    moved = {int(there): int(here) for there, here in zip(wanted, filled, strict=True) if there != here}
    assert sorted(moved) == skipped
    assert not set(moved.values()) & set(skipped)
    for one, other in zip(good, found, strict=True):
        same = [row for row in range(BATCH) if one.keys[row] == other.keys[row]]
        assert torch.equal(one.images[same], other.images[same])
        assert torch.equal(one.tokens[same, :4], other.tokens[same, :4])


def test_the_world_size_changes_nothing(bad: Path, make_config: MakeConfig) -> None:
    config = make_config(data={"folder": str(bad), "seed": 3})
    alone = batches(config, 2 * SAMPLES // BATCH)
    shares = [batches(config, 2 * SAMPLES // BATCH, rank, 2) for rank in range(2)]
    for whole, *parts in zip(alone, *shares, strict=True):
        assert whole.keys == parts[0].keys + parts[1].keys
        assert whole.skipped == parts[0].skipped + parts[1].skipped
        assert torch.equal(whole.images, torch.cat([part.images for part in parts]))


def test_a_run_counts_them_in_its_log_and_names_the_first(
    tmp_path: Path, bad: Path, make_config: MakeConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    config = make_config(data={"folder": str(bad), "seed": 3}, length="12 steps", log={"every": "6 steps"})
    for world_size in (1, 2):
        run = tmp_path / f"run{world_size}"
        train(config, run, world_size)
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        assert [line["skipped"] for line in lines] == [4, 4]
        told = capfd.readouterr().err
        assert "up to step 6, 4 samples could not be used" in " ".join(told.split())


def test_without_one_sound_picture_the_run_ends(tmp_path: Path, drawing: Drawing, make_config: MakeConfig) -> None:
    folder = write(tmp_path / "none", drawing, range(SAMPLES))
    with pytest.raises(RunError, match="is bad and so is every other tried in its place"):
        batches(make_config(data={"folder": str(folder)}), 1)
