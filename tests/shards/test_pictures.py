"""Random crops: the same wherever and whenever a sample is read, and the same from both decoders."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from infra.errors import UserError
from shards.pictures import RandomCrop, collated, drawn
from shards.sample import BadSampleError
from shards.sample import decode as plain_decode


def gradient(width: int, height: int, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    """A picture whose pixels tell where they are: red from left to right, green from top to bottom."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    out = io.BytesIO()
    options: dict[str, Any] = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    Image.fromarray(np.stack([x, y, x * 0], -1).astype(np.uint8)).convert(mode).save(out, kind, **options)
    return out.getvalue()


def sample(body: bytes, key: str = "000000001", epoch: int = 0, extension: str = "jpg") -> dict[str, Any]:
    return {"__key__": key, "__epoch__": epoch, extension: body, "txt": "señor".encode()}


def cropped(crop: RandomCrop, one: dict[str, Any]) -> np.ndarray:
    crop(one)
    return next(one[name] for name in ("jpg", "png", "webp") if name in one)


@given(
    st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 2**31), st.integers(0, 50),
    st.floats(0.01, 1.0), st.floats(0.2, 1.0),
)  # fmt: skip
def test_a_crop_lies_inside_and_is_one(
    width: int, height: int, seed: int, epoch: int, least: float, narrow: float
) -> None:
    crop = RandomCrop(scale=(least, 1.0), ratio=(narrow, 1 / narrow))
    left, top, right, bottom = crop.box(width, height, drawn(seed, epoch, "k"))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_draws_are_even_and_belong_to_seed_epoch_and_key() -> None:
    draws = np.array([drawn(0, 0, str(number)) for number in range(20_000)])
    assert np.abs(draws.mean(0) - 0.5).max() < 0.01
    assert np.abs(np.corrcoef(draws.T) - np.eye(5)).max() < 0.03
    assert (draws >= 0).all()
    assert (draws < 1).all()
    assert drawn(0, 0, "a") == drawn(0, 0, "a")
    assert len({drawn(0, 0, "a"), drawn(1, 0, "a"), drawn(0, 1, "a"), drawn(0, 0, "b")}) == 4


def test_areas_and_shapes_spread_over_what_was_asked() -> None:
    crop = RandomCrop(scale=(0.25, 0.5), ratio=(0.5, 2.0))
    boxes = np.array([crop.box(1000, 1000, drawn(0, 0, str(number))) for number in range(2000)])
    wide, high = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    share = wide * high / 1e6
    assert (share.min(), share.max()) == pytest.approx((0.25, 0.5), abs=0.01)
    assert (wide / high).min() == pytest.approx(0.5, abs=0.02)
    assert (wide / high).max() == pytest.approx(2.0, abs=0.05)
    assert (boxes[:, 0] == 0).mean() < 0.02


@pytest.mark.parametrize("decoder", ["turbo", "pillow"])
@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.1, 0.2)])
def test_the_picture_shows_the_box(decoder: Any, scale: tuple[float, float]) -> None:
    crop = RandomCrop(side=64, scale=scale, decoder=decoder)
    for key in ("a", "b", "c"):
        left, top, right, bottom = crop.box(300, 200, drawn(0, 3, key))
        found = cropped(crop, sample(gradient(300, 200), key, 3)).astype(float)
        assert found.shape == (64, 64, 3)
        middle = [255 * (left + right - 1) / 2 / 299, 255 * (top + bottom - 1) / 2 / 199]
        assert found.mean((0, 1))[:2] == pytest.approx(middle, abs=1.5)
        assert found[:, -1, 0].mean() - found[:, 0, 0].mean() == pytest.approx(255 * (right - left) / 300, abs=6)


def test_both_decoders_show_the_same() -> None:
    for factor in (1, 4):  # a little smaller, and much smaller
        pair = [
            cropped(RandomCrop(side=96, decoder=decoder), sample(gradient(130 * factor, 110 * factor))).astype(int)
            for decoder in ("turbo", "pillow")
        ]
        assert np.abs(pair[0] - pair[1]).mean() < 2


def test_flips_are_drawn_by_their_probability() -> None:
    always, never, half = (RandomCrop(side=16, flip=flip, seed=4) for flip in (1.0, 0.0, 0.5))
    body = gradient(64, 64)
    assert (cropped(always, sample(body)) == cropped(never, sample(body))[:, ::-1]).all()
    mirrored = 0
    for number in range(200):
        found = cropped(half, sample(body, str(number)))
        mirrored += int(found[:, 0, 0].mean()) > int(found[:, -1, 0].mean())
    assert 70 < mirrored < 130


@pytest.mark.parametrize(
    ("body", "extension"),
    [
        (gradient(80, 60, "PNG"), "png"),
        (gradient(80, 60, "WEBP"), "webp"),
        (gradient(80, 60, mode="L"), "jpg"),
        (gradient(80, 60, mode="CMYK"), "jpg"),
        (gradient(80, 60, "PNG", mode="P"), "jpg"),  # the extension is not what it says
    ],
    ids=["png", "webp", "grey", "cmyk", "named wrongly"],
)
def test_whatever_pillow_reads_is_read(body: bytes, extension: str) -> None:
    found = cropped(RandomCrop(side=32), sample(body, extension=extension))
    assert found.shape == (32, 32, 3)
    assert found.dtype == np.uint8


@pytest.mark.parametrize("decoder", ["turbo", "pillow"])
@pytest.mark.parametrize("body", [b"", b"\xff\xd8\xff", gradient(90, 90)[:-600], b"not a picture"])
def test_a_damaged_picture_is_a_bad_sample(decoder: Any, body: bytes) -> None:
    with pytest.raises(BadSampleError, match=r"000000001\.jpg cannot be decoded"):
        RandomCrop(side=32, decoder=decoder)(sample(body))


def test_collated_in_slot_order() -> None:
    samples = [sample(gradient(60, 40), str(number)) for number in range(3)]
    for one in samples:
        RandomCrop(side=24)(one)
    batch = collated(samples)
    assert batch["image"].shape == (3, 3, 24, 24)
    assert (batch["image"][2].permute(1, 2, 0).numpy() == samples[2]["jpg"]).all()
    assert batch["txt"] == ["señor"] * 3
    assert batch["key"] == ["0", "1", "2"]


@pytest.mark.parametrize("decoder", ["turbo", "pillow"])
def test_a_bomb_is_refused_before_it_is_decoded(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BadSampleError, match=r"000000001\.jpg cannot be decoded: .*decompression bomb"):
        RandomCrop(side=32, decoder=decoder)(sample(gradient(60, 50)))
    RandomCrop(side=32, decoder=decoder)(sample(gradient(40, 50)))


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.9])
def test_a_damaged_avif_is_a_bad_sample(cut: float) -> None:
    body = bytearray(gradient(80, 60, "AVIF"))
    at = int(len(body) * cut)
    body[at : at + 30] = bytes(30)
    for decode in (RandomCrop(side=32), RandomCrop(side=32, decoder="pillow"), plain_decode):
        one = sample(bytes(body), extension="avif")
        with contextlib.suppress(BadSampleError):
            decode(one)
    with pytest.raises(BadSampleError):
        plain_decode(sample(bytes(body[: len(body) // 2]), extension="avif"))


def test_what_runs_a_program_is_not_opened() -> None:
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(BadSampleError, match="cannot identify"):
        RandomCrop(side=32)(sample(postscript))


def test_options_that_do_not_work_out_are_the_users_mistake() -> None:
    for options in (
        {"side": 0},
        {"scale": (0.0, 1.0)},
        {"scale": (0.5, 0.4)},
        {"ratio": (2.0, 1.0)},
        {"scale": (1, 2)},
    ):
        with pytest.raises(UserError, match="crop: side"):
            RandomCrop(**options)  # type: ignore[arg-type]


def test_nothing_collated_is_an_empty_batch() -> None:
    assert collated([])["image"].shape[0] == 0
