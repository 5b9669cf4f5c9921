"""The second look batch by batch: the same removals for every cut, in bounded memory, and damaged pictures named."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import ImageEnhance

from dedup import pictures, run, second_look
from dedup.config import DedupConfig
from dedup.detail import ANY
from dedup.pictures import Bounds, Pictures, Places
from dedup.run import dedup
from dedup.signature import SignatureWriter, load
from infra.cluster import session
from infra.errors import RunError
from infra.storage import Folder
from shards.layout import DEDUP, RAW, REMOVED
from shards.writer import committed
from tests.dedup.corpora import LOCAL, Row, encoded, picture, row_of, write_corpus

CODES = ("1f98a", "1f437", "1f43b", "1f600", "1f34e")
BOUNDS = Bounds(DedupConfig().confirm_difference, ANY)
"""Thumbnails alone: for detail a file is read each time."""


@pytest.fixture(scope="module", autouse=True)
def one_ray() -> Iterator[None]:
    """One local Ray for all tests here: the stage uses the connection it finds."""
    with session(LOCAL):
        yield


def copied() -> list[Row]:
    """Five pictures and four copies of each, under two captions."""
    rows = []
    for number, code in enumerate(CODES):
        image = picture(f"noto-{code}")
        forms = [
            encoded(image), encoded(image, "JPEG", quality=60), encoded(image, "WEBP", quality=70),
            encoded(image.resize((96, 96))), encoded(ImageEnhance.Brightness(image).enhance(1.1)),
        ]  # fmt: skip
        rows += [row_of(body, "odd" if (number + at) % 3 == 0 else "even") for at, body in enumerate(forms)]
    return rows


def outcome(corpus: str, config: DedupConfig) -> bytes:
    dedup(corpus, config, LOCAL)
    folder = Folder(corpus) / DEDUP
    found = folder.read(REMOVED)
    folder.delete(REMOVED)
    return found


@pytest.mark.parametrize("unit", ["image", "pair"])
def test_the_outcome_does_not_depend_on_the_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: str) -> None:
    corpus, config = write_corpus(tmp_path, copied(), 6), DedupConfig(unit=unit, sheet=0)
    whole = outcome(corpus, config)
    assert pq.read_table(io.BytesIO(whole)).num_rows >= 8
    for most in (1, 7):
        monkeypatch.setattr(run, "BATCH_SAMPLES", most)
        assert outcome(corpus, config) == whole
    monkeypatch.setattr(second_look, "FEW_SAMPLES", 0)
    assert outcome(corpus, config) == whole


def test_a_component_beyond_what_is_held_has_the_same_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One hash, five pictures and 35 copies: five looks, and each thumbnail makes room for others many times."""
    rows = [row_of(encoded(picture(f"noto-{CODES[at % 5]}")), sha256=f"{at:064x}") for at in range(40)]
    alike = [row | {"phash": rows[0]["phash"], "phash_quality": 100} for row in rows]
    corpus, config = write_corpus(tmp_path, alike, 16), DedupConfig(keep="first", sheet=0)
    whole = outcome(corpus, config)
    kept = [int(row["kept_key"]) for row in pq.read_table(io.BytesIO(whole)).to_pylist()]
    assert kept == [at % 5 for at in range(5, 40)]
    monkeypatch.setattr(pictures, "HELD", 3)
    monkeypatch.setattr(run, "BATCH_SAMPLES", 8)
    assert outcome(corpus, config) == whole


def test_only_so_many_thumbnails_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held needs no file; what had to make room does."""
    corpus = write_corpus(tmp_path, [row_of(encoded(picture(f"noto-{code}"))) for code in CODES], 8)
    (shard,) = committed(Folder(corpus) / RAW)
    SignatureWriter(corpus).run(shard)
    signatures = load(corpus, [shard])
    places = Places(signatures.shard, signatures.image_offset, signatures.image_bytes)
    monkeypatch.setattr(pictures, "HELD", 4)
    held = Pictures(Folder(corpus) / RAW, signatures.shards, places, BOUNDS)
    held.hold_all()
    for first, second in (([0, 1], [2, 3]), ([4], [3])):
        assert not held.same(np.array(first), np.array(second)).any()
    (tmp_path / RAW / f"{shard}.tar").unlink()
    assert held.same(np.array([4, 1, 2, 3]), np.array([4, 1, 2, 3])).all()
    with pytest.raises(RunError, match=r"00000\.tar: the image at byte 512 cannot be read"):
        held.same(np.array([0]), np.array([4]))


@pytest.mark.parametrize("few", [0, 5000])
def test_a_picture_that_cannot_be_decoded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: int) -> None:
    rows = copied()[:4]
    rows.append(rows[0] | {"image": b"no picture", "sha256": "0" * 64})
    monkeypatch.setattr(second_look, "FEW_SAMPLES", few)
    with pytest.raises(RunError, match=r"00000\.tar: the image at byte \d+ cannot be decoded .* `pairmill verify`"):
        dedup(write_corpus(tmp_path / "looked", rows, 8), DedupConfig(), LOCAL)
    assert dedup(write_corpus(tmp_path / "not", rows, 8), DedupConfig(confirm=False), LOCAL)["removed"] == 4
