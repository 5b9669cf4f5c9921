"""Do we take the same pictures as img2dataset's Resizer, at the same sizes, and do they look the same?

The same bodies through both, for every resize mode, with and without `only_if_bigger`, jpg and png out, and for the
filters of side, area and aspect: photographs, and pictures of odd sizes and kinds. Left out is where the peer is
wrong by intent of ours: EXIF orientation, 16 bits, CMYK, colour profiles, alpha. Prints one JSON object; exit 1 if a
verdict or a size differs.

    python benchmarks/image_parity.py [--photographs 200] [--folder DIR]
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from photographs import photographs
from PIL import Image

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
from img2dataset.resizer import Resizer

from ingest.config import ImageConfig
from ingest.image import Picture, process

MODES = ("no", "keep_ratio", "keep_ratio_largest", "center_crop", "border")
FILTERS: tuple[dict[str, Any], ...] = (
    {"min_side": 1}, {"min_side": 200}, {"min_side": 257}, {"max_area": 65_536}, {"max_area": 500_000},
    {"max_aspect": 1.0}, {"max_aspect": 1.5}, {"max_aspect": 3.0}, {"min_side": 256, "max_aspect": 2.0},
)  # fmt: skip
ODD_SIZES = (
    (1, 1), (1, 7), (9, 1), (1, 600), (600, 2), (3, 1000), (255, 255), (256, 256), (257, 257), (256, 300), (255, 257),
    (300, 256), (257, 511), (512, 512), (513, 1025), (1024, 341), (333, 777), (640, 480), (480, 640), (1000, 1500),
)  # fmt: skip
KINDS = (("RGB", "JPEG"), ("L", "JPEG"), ("RGB", "PNG"), ("L", "PNG"), ("RGB", "WEBP"), ("P", "PNG"))
SAID_AT_MOST = 20


class Setting(NamedTuple):
    """One way to run both."""

    size: int
    mode: str
    only_if_bigger: bool
    format: str
    filters: tuple[tuple[str, Any], ...]


def settings() -> Iterator[Setting]:
    for size, mode, bigger in itertools.product((256, 100), MODES, (False, True)):
        yield Setting(size, mode, bigger, "jpg" if size == 256 else "png", ())
    for filters in FILTERS:
        yield Setting(256, "keep_ratio", False, "jpg", tuple(filters.items()))


def odd_pictures(photograph: Path) -> dict[str, bytes]:
    """Return bodies of odd sizes and kinds by name: parts of a photograph, plain encodings."""
    source = Image.open(photograph).convert("RGB")
    rng = random.Random(0)
    sizes = [*ODD_SIZES, *((rng.randint(1, 900), rng.randint(1, 900)) for _ in range(40))]
    bodies = {}
    for size, (mode, form) in itertools.product(sizes, KINDS):
        buffer = io.BytesIO()
        source.resize(size).convert(mode).save(buffer, form)
        bodies[f"{mode} {form} {size[0]}x{size[1]}"] = buffer.getvalue()
    return bodies


def by_us(body: bytes, setting: Setting) -> Picture | None:
    filters: dict[str, Any] = {"min_side": 0, "max_aspect": None, **dict(setting.filters)}
    config = ImageConfig(
        size=setting.size, resize=setting.mode, only_if_bigger=setting.only_if_bigger, format=setting.format,
        phash=False, **filters,
    )  # fmt: skip
    made = process(body, config)
    return made if isinstance(made, Picture) else None


def by_peer(body: bytes, setting: Setting) -> tuple[bytes, int, int] | None:
    names = {"min_side": "min_image_size", "max_area": "max_image_area", "max_aspect": "max_aspect_ratio"}
    resizer = Resizer(
        setting.size, setting.mode, setting.only_if_bigger, encode_format=setting.format,
        encode_quality=95 if setting.format == "jpg" else 1,
        **{names[name]: value for name, value in setting.filters},
    )  # fmt: skip
    data, width, height, *_ = resizer(io.BytesIO(body))
    return None if data is None else (data, width, height)


def psnr_db(ours: bytes, theirs: bytes) -> float:
    one, other = (cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) for data in (ours, theirs))
    error = float(np.mean((one.astype(np.float64) - other) ** 2))
    return 99.0 if error == 0 else 10 * float(np.log10(255**2 / error))


def compare(bodies: dict[str, bytes]) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Run both over all bodies; return the counts with what differs, and PSNR by setting."""
    compared = verdicts = sizes = 0
    differing: list[str] = []
    near: dict[str, list[float]] = {}
    for setting, (name, body) in itertools.product(settings(), bodies.items()):
        ours, theirs = by_us(body, setting), by_peer(body, setting)
        compared += 1
        same_verdict = (ours is None) == (theirs is None)
        same_size = same_verdict and (ours is None or theirs is None or (ours.width, ours.height) == theirs[1:])
        verdicts += same_verdict
        sizes += same_size
        if not same_size and len(differing) < SAID_AT_MOST:
            found = [one and (one.width, one.height) for one in (ours,)] + [theirs and theirs[1:]]
            differing.append(f"{name} {setting}: ours {found[0]}, theirs {found[1]}")
        if same_size and ours is not None and theirs is not None and not setting.filters and name.endswith(".jpg"):
            near.setdefault(f"{setting.mode} {setting.size} {setting.format}", []).append(psnr_db(ours.data, theirs[0]))
    shares = {"same_verdict_share": verdicts / compared, "same_size_share": sizes / compared}
    return {"comparisons": compared, **shares, "differing": differing}, near


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=None, help="where the photographs are kept; a temporary one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pairmill-bench-") as name:
        paths = photographs((given.folder or Path(name)) / "photographs", given.photographs)
        bodies = {path.name: path.read_bytes() for path in paths} | odd_pictures(paths[0])
        result, near = compare(bodies)
    result["psnr_db"] = {
        setting: {"median": round(float(np.median(found)), 2), "worst_5%": round(float(np.percentile(found, 5)), 2)}
        for setting, found in near.items()
    }
    print(json.dumps(result, indent=2))
    sys.exit(0 if result["same_verdict_share"] == result["same_size_share"] == 1 else 1)


if __name__ == "__main__":
    main()
