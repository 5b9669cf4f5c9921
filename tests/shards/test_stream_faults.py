"""What is wrong in a folder: a hole that shifts no one, or an error that names the shard."""

from __future__ import annotations

import copy
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds

from infra.errors import RunError
from infra.storage import Folder
from shards import index, reads
from shards.access import Samples
from shards.reads import Reader
from shards.stream import ShardStream
from tests.shards.damaged import flip

pytestmark = pytest.mark.usefixtures("either_read")
BATCH = 6


def slots(folder: Folder, world: int = 1, **options: Any) -> tuple[dict[tuple[int, int], str], int, list[int]]:
    """Key by (step, slot) of an epoch, how many holes were counted, which samples they were."""
    seen, holes, named = {}, 0, []
    for rank in range(world):
        stream = ShardStream(folder, global_batch_size=BATCH, rank=rank, world_size=world, patience_s=0.5, **options)
        for sample in stream.samples():
            seen[sample["__step__"], sample["__slot__"]] = sample["__key__"]
            named += [sample["__hole__"]] if "__hole__" in sample else []
        holes += stream.holes
    return seen, holes, sorted(named)


def check_holes(folder: Folder, good: dict[tuple[int, int], str], bad: set[str], **options: Any) -> None:
    """All but the bad samples stand where they stood, at every world size; the holes are filled alike."""
    first, holes, named = slots(folder, **options)
    assert holes == len(named) == len(bad)
    assert first.keys() == good.keys()
    assert {place: key for place, key in first.items() if good[place] not in bad} == {
        place: key for place, key in good.items() if key not in bad
    }
    assert not bad & set(first.values())
    assert slots(folder, 3, **options)[0] == first


@pytest.fixture
def good(own_shards: Folder) -> dict[tuple[int, int], str]:
    return slots(own_shards, remainder="keep")[0]


def key_of(folder: Folder, number: int) -> str:
    """The key of a sample by its number."""
    return str(Samples(folder)[number]["__key__"])


def test_a_flipped_header_is_a_hole(
    own_shards: Folder, good: dict[tuple[int, int], str], caplog: pytest.LogCaptureFixture
) -> None:
    bad = key_of(own_shards, 17 + 4)
    flip(own_shards, "00001.tar", int(index.load(own_shards).ends(1)[3]) + 5)
    with caplog.at_level(logging.WARNING, logger="pairmill"):
        check_holes(own_shards, good, {bad}, remainder="keep")
    assert "00001.tar: sample 21 is a hole: byte 0: damaged tar header" in caplog.text


def test_an_image_that_cannot_be_decoded_is_a_hole_only_when_decoded(
    own_shards: Folder, good: dict[tuple[int, int], str]
) -> None:
    start = int(index.load(own_shards).ends(0)[7]) + 512
    flip(own_shards, "00000.tar", start)  # the JPEG's first byte
    assert slots(own_shards, remainder="keep")[1] == 0
    check_holes(own_shards, good, {key_of(own_shards, 8)}, remainder="keep", decode=True)


def test_a_sample_without_text_or_image_is_a_hole_if_it_is_needed(tmp_path: Path) -> None:
    with wds.TarWriter(str(tmp_path / "a.tar")) as out:
        for row in range(12):
            out.write(
                {"__key__": f"{row:03d}"} | ({"jpg": b"i"} if row != 3 else {}) | ({"txt": b"t"} if row != 8 else {})
            )
    folder = Folder(tmp_path)
    assert slots(folder)[2] == [3, 8]
    assert slots(folder, needs=("txt",))[2] == [8]
    assert slots(folder, needs=())[1] == 0


@pytest.mark.parametrize("fault", ["truncated", "missing", "longer"])
def test_a_shard_that_stays_unreadable_ends_the_run_or_is_skipped_as_told(
    own_shards: Folder, good: dict[tuple[int, int], str], fault: str
) -> None:
    path = Path(own_shards.path("00001.tar"))
    if fault == "missing":
        path.unlink()
    elif fault == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        shutil.copy(own_shards.path("00002.tar"), path)
    with pytest.raises(RunError, match=r"00001\.tar: this shard"):
        slots(own_shards)
    if fault == "missing":
        bad = {key for key in good.values() if key.startswith("00001")}
        check_holes(own_shards, good, bad, remainder="keep", skip_unreadable=True)


def test_nothing_but_bad_samples_is_an_error(tmp_path: Path) -> None:
    with wds.TarWriter(str(tmp_path / "a.tar")) as out:
        for row in range(8):
            out.write({"__key__": f"{row:03d}", "cls": b"7"})
    with pytest.raises(RunError, match="every other tried in its place"):
        slots(Folder(tmp_path))


def test_a_lost_shard_is_given_up_once_for_all_stand_ins(own_shards: Folder, caplog: pytest.LogCaptureFixture) -> None:
    stream = ShardStream(own_shards, global_batch_size=BATCH, patience_s=0.5, skip_unreadable=True)
    Path(own_shards.path("00001.tar")).unlink()
    with caplog.at_level(logging.WARNING, logger="pairmill"):
        for hole in (15, 16, 20):
            assert next(stream.stand_ins(hole, {"__epoch__": 0}))["__hole__"] == hole
    assert sum("cannot be read" in record.getMessage() for record in caplog.records) == 1
    assert next(copy.deepcopy(stream).stand_ins(20, {"__epoch__": 0}))["__hole__"] == 20


def test_a_shard_that_comes_back_is_read_again(own_shards: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader(own_shards, index.load(own_shards), 0.2)
    path = Path(own_shards.path("00001.tar"))
    good = reader.read(17, 20)[0].sample(18)
    content = path.read_bytes()
    path.write_bytes(b"")
    assert reader.read(17, 20)[0].fault is not None
    path.write_bytes(content)
    assert reader.read(17, 20)[0].fault is not None
    monkeypatch.setattr(reads, "LOST_FOR_S", 0.0)
    assert reader.read(17, 20)[0].sample(18) == good
    monkeypatch.undo()
    assert reader.read(17, 20)[0].sample(18) == good


def test_the_log_names_a_shards_first_holes(own_shards: Folder, caplog: pytest.LogCaptureFixture) -> None:
    Path(own_shards.path("00001.tar")).unlink()
    with caplog.at_level(logging.WARNING, logger="pairmill"):
        _, holes, _ = slots(own_shards, skip_unreadable=True)
    assert holes > 20
    said = [record.getMessage() for record in caplog.records]
    assert sum("is a hole" in line for line in said) == 5
    assert sum("more holes" in line for line in said) == 1
