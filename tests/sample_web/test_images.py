"""Every odd kind of image is, over the wire, what its name says."""

from __future__ import annotations

import io
import urllib.request

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from pairmill.sample_web import archive, misbehaviour, pictures
from pairmill.sample_web.process import SampleWeb

KEY = "noto-1f600"


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as answer:
        body: bytes = answer.read()
    return body


def fetch(web: SampleWeb, kind: str) -> Image.Image:
    return Image.open(io.BytesIO(get(web.url(kind, KEY))))


def difference(image: Image.Image) -> float:
    """The mean difference to the right picture, of 255."""
    right = np.asarray(archive.by_key()[KEY].image(pictures.SIDE_PX), dtype=float)
    return float(np.abs(np.asarray(image.convert("RGB"), dtype=float) - right).mean())


@pytest.mark.parametrize(
    ("kind", "form", "mode"),
    [
        ("progressive", "JPEG", "RGB"),
        ("cmyk", "JPEG", "CMYK"),
        ("grey", "JPEG", "L"),
        ("png_16_bit", "PNG", "RGB"),
        ("palette_alpha", "PNG", "P"),
        ("animated_gif", "GIF", "P"),
        ("webp", "WEBP", "RGBA"),
        ("avif", "AVIF", "RGB"),
        ("wrong_type", "JPEG", "RGB"),
    ],
)
def test_format_and_mode(web: SampleWeb, kind: str, form: str, mode: str) -> None:
    image = fetch(web, kind)
    assert (image.format, image.mode) == (form, mode)
    image.load()


def test_progressive(web: SampleWeb) -> None:
    assert fetch(web, "progressive").info["progressive"]


def test_colours_survive_cmyk_16_bit_and_avif(web: SampleWeb) -> None:
    assert difference(fetch(web, "cmyk")) < 2
    assert difference(fetch(web, "png_16_bit")) == 0
    assert difference(fetch(web, "avif")) < 4


def test_16_bit_header(web: SampleWeb) -> None:
    assert get(web.url("png_16_bit", KEY))[24:26] == b"\x10\x02"  # bit depth 16, colour type RGB


def test_palette_has_alpha(web: SampleWeb) -> None:
    image = fetch(web, "palette_alpha")
    assert "transparency" in image.info
    assert image.convert("RGBA").getchannel("A").getextrema() == (0, 255)


def test_gif_moves(web: SampleWeb) -> None:
    assert getattr(fetch(web, "animated_gif"), "n_frames", 1) == 3


def test_exif_rotation_makes_it_upright(web: SampleWeb) -> None:
    stored = fetch(web, "exif_rotated")
    assert stored.size == (128, 160)
    upright = ImageOps.exif_transpose(stored)
    assert upright.size == (160, 128)
    assert difference(upright.crop((16, 0, 144, 128))) < 4
    assert difference(stored.crop((0, 16, 128, 144))) > 20


def test_icc_profile_restores_the_colours(web: SampleWeb) -> None:
    image = fetch(web, "icc_profile")
    profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
    restored = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"))
    assert restored is not None
    assert difference(restored) < 3 < difference(image)


def test_truncated_image(web: SampleWeb) -> None:
    image = fetch(web, "truncated_image")
    with pytest.raises(OSError, match="truncated"):
        image.load()


@pytest.mark.parametrize("kind", ["zero_bytes", "svg", "html"])
def test_not_an_image(web: SampleWeb, kind: str) -> None:
    with pytest.raises(UnidentifiedImageError):
        fetch(web, kind)


def test_header_bomb_is_small_and_announces_much(web: SampleWeb) -> None:
    body = get(web.url("header_bomb", KEY))
    assert len(body) < 10_000
    assert int.from_bytes(body[16:20], "big") * int.from_bytes(body[20:24], "big") == 3_600_000_000
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(body))


def test_out_of_bounds(web: SampleWeb) -> None:
    assert fetch(web, "too_small").size == (8, 8)
    assert fetch(web, "wide_banner").size == (640, 64)


def test_good_copies_and_variants(web: SampleWeb) -> None:
    base = web.base_urls[0]
    good = get(base + pictures.good_path(KEY))
    assert good == get(web.base_urls[-1] + pictures.copy_path(KEY, 2))
    assert difference(Image.open(io.BytesIO(good))) < 4
    for name in pictures.VARIANTS:
        body = get(base + pictures.variant_path(KEY, name))
        assert body != good
        scaled = Image.open(io.BytesIO(body)).convert("RGB").resize((128, 128))
        assert difference(scaled) < 8


def test_good_web_mixes_formats() -> None:
    files = [pictures.good(picture.key).body for picture in archive.select("train")[::20]]
    images = [Image.open(io.BytesIO(body)) for body in files]
    assert {image.format for image in images} == {"JPEG", "PNG", "WEBP"}
    assert {bool(image.info.get("progressive")) for image in images} == {True, False}
    assert {image.size for image in images} == {(128, 128)}


def test_catalogue_covers_every_odd_image() -> None:
    assert set(pictures.ODD_KINDS) - {"baseline"} <= set(misbehaviour.BY_KIND)
