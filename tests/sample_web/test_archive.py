from __future__ import annotations

import io
import zipfile
from pathlib import Path

from PIL import Image

from pairmill.sample_web import archive


def test_archive_is_within_its_limit_and_carries_its_attributions() -> None:
    assert archive.ARCHIVE.stat().st_size <= 12_000_000
    beside = Path(archive.__file__).with_name("ATTRIBUTIONS.md").read_text(encoding="utf-8")
    assert archive.attributions() == beside
    for word in (
        "Apache-2.0",
        "CC-BY-4.0",
        "CC-BY-SA-4.0",
        "MIT",
        "Google",
        "Twitter",
        "OpenMoji",
        "Microsoft",
    ):
        assert word in beside
    for word in ("Apple", "Facebook"):
        assert word not in beside


def test_archive_is_reproducible_zip() -> None:
    with zipfile.ZipFile(archive.ARCHIVE) as content:
        entries = content.infolist()
    images = [entry for entry in entries if entry.filename.endswith(".webp")]
    assert len(images) == len(archive.load())
    assert all(entry.compress_type == zipfile.ZIP_STORED for entry in images)
    assert {entry.date_time for entry in entries} == {(1980, 1, 1, 0, 0, 0)}
    assert [entry.filename for entry in images] == sorted(entry.filename for entry in images)


def test_every_family_has_about_1550_names_and_each_name_one_concept() -> None:
    names = {(picture.hexcode, picture.name) for picture in archive.load()}
    assert len({hexcode for hexcode, _ in names}) == len({name for _, name in names}) == len(names)
    for family in archive.FAMILIES:
        mine = [picture for picture in archive.load() if picture.family == family]
        assert 1550 <= len(mine) <= 1650
        assert len({picture.name for picture in mine}) == len(mine)


def test_no_flags_no_skin_tones_no_regional_indicators() -> None:
    for picture in archive.load():
        assert "flag" not in picture.name.split()
        assert "skin tone" not in picture.name
        codes = [int(code, 16) for code in picture.hexcode.split("-")]
        assert not any(0x1F1E6 <= code <= 0x1F1FF or 0x1F3FB <= code <= 0x1F3FF for code in codes)


def test_splits() -> None:
    train = archive.select("train")
    style = archive.select("held_out_style")
    unseen = archive.select("unseen_concepts")
    assert len(train) + len(style) + len(unseen) == len(archive.load())
    assert {picture.family for picture in train} == {"fluent", "noto", "openmoji"}
    assert {picture.family for picture in style} == {"twemoji"}
    assert len({picture.name for picture in unseen}) == 100
    assert len(unseen) == 400
    assert not {picture.name for picture in train} & {picture.name for picture in unseen}


def test_training_shows_no_picture_of_a_hold_out_under_another_name() -> None:
    shown = {picture.bytes() for picture in archive.select("train")}
    assert not any(picture.bytes() in shown for picture in archive.load() if picture.split != "train")


def test_hold_outs_have_unique_names_and_readable_pictures() -> None:
    style, unseen = archive.hold_outs(side_px=64)
    assert (style.name, unseen.name) == ("held_out_style", "unseen_concepts")
    assert len(style.names) == len(style.images) >= 1450
    assert len(unseen.names) == 100
    assert len(unseen.images) == 400
    for hold_out in (style, unseen):
        assert len(set(hold_out.names)) == len(hold_out.names)
        assert len(hold_out.targets) == len(hold_out.images) == len(hold_out.families)
        assert set(hold_out.targets) == set(range(len(hold_out.names)))
        image = Image.open(io.BytesIO(hold_out.images[0]))
        assert (image.mode, image.size) == ("RGB", (64, 64))


def test_pictures_lie_on_white() -> None:
    for picture in archive.load()[::400]:
        image = picture.image(128)
        assert image.size == (128, 128)
        assert len(image.getcolors(128 * 128) or ()) > 1, picture.path
    heart = archive.by_key()["noto-2764"].image()
    assert heart.getpixel((0, heart.height - 1)) == (255, 255, 255)
