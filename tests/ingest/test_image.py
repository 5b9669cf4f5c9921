"""Pictures of every kind come out with the right size and the right colours, or are refused for the right reason."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ingest import turbo
from ingest.config import ImageConfig
from ingest.geometry import geometry, size_reason
from ingest.image import Picture, Refusal, process, refusal_by_header
from pairmill.sample_web import archive, icc, pictures
from shards.layout import Reason, Status
from shards.pdq import pdq

RED, GREEN, BLUE, WHITE = (200, 30, 40), (20, 160, 60), (30, 60, 190), (255, 255, 255)
PLAIN = ImageConfig(size=64, format="png")


def quarters(width: int = 128, height: int = 128) -> Image.Image:
    """A picture whose quarters, row by row, are red, green, blue, white."""
    image = Image.new("RGB", (width, height), WHITE)
    half = (width // 2, height // 2)
    for at, colour in (((0, 0), RED), ((half[0], 0), GREEN), ((0, half[1]), BLUE)):
        image.paste(colour, (*at, at[0] + half[0], at[1] + half[1]))
    return image


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def made(body: bytes, config: ImageConfig = PLAIN) -> tuple[Picture, Image.Image]:
    result = process(body, config)
    assert isinstance(result, Picture), result
    image = Image.open(io.BytesIO(result.data))
    image.load()
    assert image.size == (result.width, result.height)
    assert image.mode == "RGB"
    return result, image


def refused(body: bytes, config: ImageConfig = PLAIN) -> Refusal:
    result = process(body, config)
    assert isinstance(result, Refusal), result
    return result


def assert_quarters(image: Image.Image, colours: tuple[Any, ...] = (RED, GREEN, BLUE, WHITE), near: int = 8) -> None:
    width, height = image.size
    places = [(0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)]
    for (x, y), colour in zip(places, colours, strict=True):
        found = image.getpixel((int(width * x), int(height * y)))
        assert np.abs(np.subtract(found, colour)).max() <= near, (found, colour)


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("JPEG", {"quality": 95}),
        ("JPEG", {"quality": 95, "progressive": True}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("AVIF", {"quality": 95}),
        ("BMP", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("JPEG2000", {}),
        ("PPM", {}),
    ],
)
def test_formats(form: str, options: dict[str, Any]) -> None:
    result, image = made(encoded(quarters(), form, **options))
    assert (result.original_width, result.original_height) == (128, 128)
    assert image.size == (64, 64)
    assert_quarters(image)


def test_cmyk_as_files_have_it() -> None:
    cmyk = quarters().convert("CMYK")
    assert_quarters(made(encoded(cmyk, "JPEG", quality=95))[1], near=12)
    assert_quarters(made(encoded(cmyk, "TIFF"))[1], near=12)


def test_grey() -> None:
    grey = quarters().convert("L")
    levels = tuple((grey.getpixel(at),) * 3 for at in ((32, 32), (96, 32), (32, 96), (96, 96)))
    assert_quarters(made(encoded(grey, "PNG"))[1], levels)
    assert_quarters(
        made(encoded(grey.convert("1", dither=Image.Dither.NONE), "PNG"))[1],
        ((0,) * 3, (0,) * 3, (0,) * 3, WHITE),
    )


def test_sixteen_bits_are_scaled_and_not_cut_off() -> None:
    levels = np.repeat(np.repeat(np.array([[0x1000, 0x4000], [0x8000, 0xFFFF]], np.uint16), 64, 0), 64, 1)
    body = encoded(Image.fromarray(levels), "PNG")
    assert_quarters(made(body)[1], ((16,) * 3, (64,) * 3, (128,) * 3, WHITE), near=2)
    assert_quarters(
        made(encoded(Image.fromarray(levels.astype(np.int32)), "TIFF"))[1],
        ((16,) * 3, (64,) * 3, (128,) * 3, WHITE),
        near=2,
    )
    picture = archive.select("train")[0]
    deep = made(pictures.odd("png_16_bit", picture.key).body)[1]
    plain = made(encoded(picture.image(128), "PNG"))[1]
    assert np.abs(np.asarray(deep, int) - np.asarray(plain, int)).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = quarters(160, 96)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    for form in ("JPEG", "PNG", "WEBP"):
        result, image = made(encoded(stored, form, exif=exif))
        assert (result.original_width, result.original_height) == (160, 96)
        assert image.size == (107, 64)
        assert_quarters(image, near=16)


def test_damaged_exif_costs_no_picture() -> None:
    body = encoded(quarters(), "JPEG", quality=95, exif=b"Exif\0\0II*\0\xff\xff\xff\x7fgarbage")
    assert_quarters(made(body)[1])


def test_colours_of_a_profile_are_brought_to_srgb() -> None:
    body = encoded(icc.from_srgb(quarters()), "JPEG", quality=98, icc_profile=icc.adobe_rgb_profile(), subsampling=0)
    assert_quarters(made(body)[1], near=8)
    with Image.open(io.BytesIO(body)) as plain:
        unmanaged = plain.convert("RGB").getpixel((96, 32))
    assert np.abs(np.subtract(unmanaged, GREEN)).max() > 20
    broken = encoded(quarters(), "JPEG", quality=95, icc_profile=b"not a profile" * 20)
    assert_quarters(made(broken)[1])


@pytest.mark.parametrize("background", ["#ffffff", "#102030"])
def test_what_is_transparent_shows_the_background(background: str) -> None:
    config = ImageConfig(size=64, format="png", background=background)
    behind = config.background_rgb
    clear = quarters().convert("RGBA")
    clear.paste((255, 0, 255, 0), (64, 64, 128, 128))
    half = Image.new("RGBA", (128, 128), (0, 0, 0, 128))
    for form in ("PNG", "WEBP"):
        options = {"lossless": True} if form == "WEBP" else {}
        assert_quarters(made(encoded(clear, form, **options), config)[1], (RED, GREEN, BLUE, behind))
        blend = tuple(round(value * 127 / 255) for value in behind)
        assert_quarters(made(encoded(half, form, **options), config)[1], (blend,) * 4)
    palette = clear.quantize(8, method=Image.Quantize.FASTOCTREE)
    assert_quarters(made(encoded(palette, "PNG"), config)[1], (RED, GREEN, BLUE, behind), near=20)
    keyed = encoded(quarters(), "PNG", transparency=RED)
    assert_quarters(made(keyed, config)[1], (behind, GREEN, BLUE, WHITE))
    grey = encoded(quarters().convert("LA"), "PNG")
    assert made(grey, config)[1].getpixel((48, 48)) == WHITE


def test_the_first_frame_of_an_animation() -> None:
    frames = [quarters(), Image.new("RGB", (128, 128), (0, 0, 0))]
    for form in ("GIF", "WEBP", "PNG"):
        options: dict[str, Any] = {"lossless": True} if form == "WEBP" else {}
        body = encoded(frames[0], form, save_all=True, append_images=frames[1:], duration=100, **options)
        assert_quarters(made(body)[1])


@pytest.mark.parametrize(
    ("mode", "size", "kept"),
    [
        ("keep_ratio", (200, 100), (128, 64)),
        ("keep_ratio_largest", (200, 100), (64, 32)),
        ("center_crop", (200, 100), (64, 64)),
        ("border", (200, 100), (64, 64)),
        ("no", (200, 100), (200, 100)),
        ("keep_ratio", (33, 32), (66, 64)),
        ("border", (20, 40), (64, 64)),
    ],
)
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_resize_modes(mode: Any, size: tuple[int, int], kept: tuple[int, int], form: str) -> None:
    config = ImageConfig(size=64, resize=mode, format="png")
    result, image = made(encoded(quarters(*size), form, quality=95), config)
    assert image.size == kept
    assert (result.original_width, result.original_height) == size
    if mode == "border":
        assert image.getpixel((0, 0)) == WHITE
        assert image.getpixel((63, 63)) == WHITE
    smaller = ImageConfig(size=256, resize=mode, format="png", only_if_bigger=True)
    assert made(encoded(quarters(*size), form, quality=95), smaller)[1].size == size


@given(
    st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 600),
    st.sampled_from(["no", "keep_ratio", "keep_ratio_largest", "center_crop", "border"]), st.booleans(),
)  # fmt: skip
def test_sizes_are_in_bounds(width: int, height: int, size: int, mode: Any, only_if_bigger: bool) -> None:
    config = ImageConfig(size=size, resize=mode, only_if_bigger=only_if_bigger)
    found = geometry(width, height, config)
    assert min(found.width, found.height, *found.canvas) >= 1
    if mode in ("center_crop", "border") and not only_if_bigger:
        assert found.canvas == (size, size)
    if mode == "keep_ratio" and not only_if_bigger:
        assert min(found.canvas) == size
    if mode in ("keep_ratio_largest", "border") and not (mode == "border" and only_if_bigger):
        assert max(found.canvas) <= max(size, width if only_if_bigger else 0, height if only_if_bigger else 0)


def test_encodings_and_original_bytes() -> None:
    body = encoded(quarters(), "JPEG", quality=90)
    assert made(body, ImageConfig(size=64))[0].data[:3] == b"\xff\xd8\xff"
    assert made(body, ImageConfig(size=64, format="webp"))[0].data[8:12] == b"WEBP"
    keep = ImageConfig(size=128, only_if_bigger=True, skip_reencode=True)
    assert made(body, keep)[0].data == body
    turned = Image.Exif()
    turned[0x0112] = 3
    for other in (
        encoded(quarters(), "PNG"),
        encoded(quarters(), "JPEG", exif=turned),
        encoded(quarters(), "JPEG", icc_profile=icc.adobe_rgb_profile()),
        encoded(quarters().convert("CMYK"), "JPEG"),
        encoded(quarters(300, 300), "JPEG"),
    ):
        assert made(other, keep)[0].data != other
    assert isinstance(process(body[:-200], keep), Refusal)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", Reason.NOT_AN_IMAGE),
        (b"<!doctype html><html></html>", Reason.NOT_AN_IMAGE),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", Reason.NOT_AN_IMAGE),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", Reason.NOT_AN_IMAGE),
        (encoded(quarters(), "JPEG")[:900], Reason.DECODE_ERROR),
        (encoded(quarters(), "PNG")[:200], Reason.DECODE_ERROR),
    ],
)
def test_what_is_no_picture(body: bytes, reason: Reason) -> None:
    found = refused(body)
    assert (found.status, found.reason) == (Status.FAILED_TO_RESIZE, reason)
    assert "\n" not in found.detail


def test_a_pixel_bomb_is_refused_before_its_memory_is_taken() -> None:
    rows = zlib.compress(bytes((1 + 60_000 // 8) * 100))
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)),
        (b"IDAT", rows),
        (b"IEND", b""),
    )
    body = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    tracemalloc.start()
    try:
        found = refused(body)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (found.status, found.reason) == (Status.FAILED_TO_RESIZE, Reason.TOO_MANY_PIXELS)
    assert "3600000000 pixels" in found.detail
    with pytest.raises(Image.DecompressionBombError):  # what this process' other users of Pillow rely on
        Image.open(io.BytesIO(body))
    assert peak < 2**20


def test_filters_by_size_also_from_the_header_alone() -> None:
    config = ImageConfig(min_side=50, max_aspect=3.0, max_pixels=1_000_000)
    assert size_reason(50, 150, config) == Reason.NONE
    for size, reason, status in (
        ((49, 60), Reason.TOO_SMALL, Status.FILTERED),
        ((60, 200), Reason.ASPECT, Status.FILTERED),
        ((200, 60), Reason.ASPECT, Status.FILTERED),
        ((1001, 1000), Reason.TOO_MANY_PIXELS, Status.FAILED_TO_RESIZE),
    ):
        noise = Image.frombytes("RGB", size, random.Random(0).randbytes(3 * size[0] * size[1]))
        for form in ("JPEG", "PNG"):
            body = encoded(noise, form)
            early = refusal_by_header(body[: len(body) // 3], config)
            assert early == process(body, config)
            assert (early.status, early.reason) == (status, reason)
    assert refusal_by_header(encoded(quarters(), "JPEG")[:700], config) is None
    assert refusal_by_header(b"\xff\xd8\xff\xe0", config) is None


def test_the_perceptual_hash_stays_near_for_one_picture_and_far_for_two() -> None:
    one, two = archive.select("train")[0], archive.select("train")[60]

    def bits(image: Image.Image) -> Any:
        return np.unpackbits(np.frombuffer(bytes.fromhex(pdq(image)[0]), np.uint8))

    sharp, soft = one.image(256), Image.open(io.BytesIO(encoded(one.image(128), "JPEG", quality=60)))
    assert len(pdq(sharp)[0]) == 64
    assert (bits(sharp) != bits(soft.convert("RGB"))).sum() <= 31
    assert (bits(sharp) != bits(two.image(256))).sum() > 60
    assert process(encoded(sharp, "PNG"), ImageConfig(phash=False)).phash is None  # type: ignore[union-attr]


def test_malformed_files_cost_one_row_each() -> None:
    draw = random.Random(7)
    seeds = [
        encoded(quarters(), form, **({"save_all": True, "append_images": [quarters()]} if form == "GIF" else {}))
        for form in ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "PPM", "JPEG2000")
    ]
    for _ in range(600):
        body = bytearray(draw.choice(seeds))
        for _ in range(draw.randint(1, 12)):
            body[draw.randrange(len(body))] = draw.randrange(256)
        cut = bytes(body[: draw.choice((len(body), draw.randrange(len(body)) + 1))])
        assert isinstance(process(cut, PLAIN), Picture | Refusal)
        assert isinstance(refusal_by_header(cut, PLAIN), Refusal | None)


@pytest.mark.parametrize(("width", "height"), [(1024, 700), (511, 300), (300, 800), (257, 257)])
def test_a_plain_jpeg_goes_the_short_way_to_nearly_the_same_picture(width: int, height: int) -> None:
    """What is damaged goes the long way, so that one decoder alone says what a broken file is."""
    config = ImageConfig(size=64, quality=95)
    body = encoded(quarters(width, height), "JPEG", quality=90)
    target = geometry(width, height, config)
    short = turbo.shrunk(body, width, height, target)
    assert short is not None
    assert short.shape == (target.height, target.width, 3)
    assert made(body, config)[0].data == turbo.encoded(short, 95)
    long, _ = made(encoded(quarters(width, height), "PNG"), config)
    there = np.asarray(Image.open(io.BytesIO(long.data)).convert("RGB")).astype(float)
    assert there.shape == short.shape
    assert np.median(np.abs(there - short)) <= 3
    assert turbo.shrunk(body[:-200], width, height, target) is None
    assert refused(body[:-200], config).reason == Reason.DECODE_ERROR


PEAK = """
import sys
from pathlib import Path
from ingest.config import ImageConfig
from ingest.image import Picture, process
def peak_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
small = Path(sys.argv[1]).read_bytes()
assert isinstance(process(small, ImageConfig()), Picture)
before = peak_bytes()
for name in sys.argv[1:]:
    assert isinstance(process(Path(name).read_bytes(), ImageConfig()), Picture), name
print(peak_bytes() - before)
"""


def peak_of(paths: list[Path]) -> int:
    """Return what a process takes more for these pictures, in bytes, than for the first, a small one, alone."""
    ended = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, paths)], capture_output=True, text=True, check=False, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    return int(ended.stdout)


def small(folder: Path) -> Path:
    path = folder / "small.jpg"
    path.write_bytes(encoded(quarters(), "JPEG"))
    return path


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")


@needs_proc
@pytest.mark.parametrize(("mode", "bytes_a_pixel"), [("I;16", 2), ("F", 4)])
def test_deep_grey_takes_little_more_than_its_own_pixels(tmp_path: Path, mode: str, bytes_a_pixel: int) -> None:
    """A file of some kilobytes: as float32 at once its pixels and the steps over them would take four times that."""
    path, (width, height) = tmp_path / "large.tif", (8000, 5000)
    Image.new(mode, (width, height), 1).save(path, "TIFF", compression="tiff_adobe_deflate")
    assert path.stat().st_size < 2**20
    assert peak_of([small(tmp_path), path]) < width * height * (bytes_a_pixel + 2)


@pytest.mark.parametrize(
    ("dtype", "white"), [("<u2", 0xFFFF), ("<i4", 0xFFFF), ("<i4", 2**31 - 1), ("<f4", 1), ("<f4", 255)]
)
def test_strips_do_not_show(monkeypatch: pytest.MonkeyPatch, dtype: str, white: float) -> None:
    """The brightest value is in one strip alone, and says what white is in all of them."""
    values = (np.linspace(0, white, 96 * 64).reshape(64, 96)).astype(dtype)
    monkeypatch.setattr("ingest.image.STRIP_PIXELS", 96 * 5)
    found = np.asarray(made(encoded(Image.fromarray(values), "TIFF"), ImageConfig(resize="no", format="png"))[1])
    wanted = values.astype(float) * 255 / white
    assert np.abs(found[..., 0] - wanted).max() <= 1


def test_a_hole_in_a_picture_of_floats_does_not_darken_it() -> None:
    values = np.full((64, 64), 0.5, np.float32)
    values[5, 5] = np.nan
    assert made(encoded(Image.fromarray(values), "TIFF"))[1].getpixel((40, 40)) == (128, 128, 128)


@needs_proc
def test_profiles_do_not_gather_in_memory(tmp_path: Path) -> None:
    """Each picture has a profile of its own, larger than any in use or as large as those of presses."""
    paths = [small(tmp_path)]
    for size, pictures_of_it in ((15 * 10**6, 10), (3 * 10**6, 20)):
        profile = icc.adobe_rgb_profile() + b"########" + bytes(size)
        body = encoded(quarters(), "JPEG", icc_profile=profile)
        for number in range(pictures_of_it):
            paths.append(tmp_path / f"{size}-{number}.jpg")
            paths[-1].write_bytes(body.replace(b"########", f"{number:08d}".encode()))
    assert peak_of(paths) < 100 * 10**6


def test_a_large_profile_counts_and_one_beyond_use_does_not() -> None:
    shown = []
    for size in (3 * 10**6, 15 * 10**6):
        profile = icc.adobe_rgb_profile() + bytes(size)
        body = encoded(icc.from_srgb(quarters()), "JPEG", quality=98, icc_profile=profile, subsampling=0)
        shown.append(made(body)[1].getpixel((48, 16)))
    assert np.abs(np.subtract(shown[0], GREEN)).max() <= 8
    assert np.abs(np.subtract(shown[1], GREEN)).max() > 20
