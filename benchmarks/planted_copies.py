"""Which copies of pictures are found, beside imagehash's and imagededup's pHash, at how many false pairs?

Pictures are those of the sample web and of `--pictures` (folders, subfolders too), on white, at most 512 pixels a side.
Of two whose 32x32 grey thumbnails hardly differ only the first is taken, so that all are distinct; then some of them
are copied in seven ways. A pair is found as `pairmill dedup` finds it: PDQ hashes that are near, none of them too
flat, thumbnails that agree, and detail that does; once with hashes compared up to the default of 31 bits, once up to
80. The peers' pairs are those within 10 of 64 bits, their usual limit, and within the largest distance at which no two
distinct pictures are a pair (-1: some have equal hashes). `writing` tells of forms, of a series of numbers, of pages
and of posts, which differ in what is written alone, how many pairs are taken for the same. Prints one JSON object;
ratios are our mean recall over the seven ways to the better peer's (null where it finds nothing).

    python benchmarks/planted_copies.py [--pictures DIR ...] [--count 10000] [--copied 1000]
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import numpy.typing as npt
import writing
from peers import IMAGEDEDUP, IMAGEDEDUP_FOLDER, imagededup_phash
from PIL import Image, ImageDraw, ImageEnhance

from dedup.config import DedupConfig
from dedup.confirm import thumbnail
from dedup.detail import most_left, plane
from dedup.hamming import all_pairs, distances
from dedup.same_look import FIRST_CROPPED, NONE, SECOND_CROPPED, Ways, crops, ways
from pairmill.sample_web import archive
from shards.pdq import pdq

MOST_SIDE_PX, LEAST_SIDE_PX, MOST_PIXELS = 512, 48, 20_000_000
GREY_SIDE_PX, DISTINCT_RMS = 32, 6.0
"""Grey levels, 0 to 255: two pictures whose thumbnails differ by less are one picture to a person, too."""
PEER_BITS, PEER_DISTANCE = 64, 10
DISTANCES = (DedupConfig().distance, 80)
SEED = 0
Hashes = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.int64]


def _encoded(picture: Image.Image, form: str, **options: Any) -> Image.Image:
    data = io.BytesIO()
    picture.save(data, form, **options)
    return Image.open(data).convert("RGB")


def _resized(picture: Image.Image) -> Image.Image:
    return picture.resize([max(1, side // 2) for side in picture.size], Image.Resampling.BICUBIC)


def _cropped(picture: Image.Image) -> Image.Image:
    wide, high = picture.size
    left, top = round(0.025 * wide), round(0.025 * high)
    return picture.crop((left, top, wide - left, high - top))


def _coloured(picture: Image.Image) -> Image.Image:
    return ImageEnhance.Color(ImageEnhance.Brightness(picture).enhance(1.1)).enhance(1.25)


def _overlaid(picture: Image.Image) -> Image.Image:
    """A dark label with writing, 30% of the width and 10% of the height, in the lower right corner."""
    wide, high = picture.size
    label, place = Image.new("RGB", (100, 30), (20, 20, 20)), (int(0.68 * wide), int(0.88 * high))
    ImageDraw.Draw(label).text((8, 8), "photo.example", (240, 240, 240))
    copy = picture.copy()
    copy.paste(label.resize((max(1, int(0.3 * wide)), max(1, int(0.1 * high)))), place)
    return copy


WAYS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "resize": _resized,
    "jpeg_50": lambda picture: _encoded(picture, "JPEG", quality=50),
    "webp": lambda picture: _encoded(picture, "WEBP", quality=60),
    "crop": _cropped,
    "colour": _coloured,
    "overlay": _overlaid,
    "greyscale": lambda picture: picture.convert("L").convert("RGB"),
}


def pictures(folders: list[Path]) -> Iterator[Image.Image]:
    """Yield the sample web's pictures, then those of `folders`, as RGB on white."""
    for one in archive.load():
        yield one.image()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
                drawn = _drawn(path)
                if drawn is not None:
                    canvas = Image.new("RGB", drawn.size, archive.WHITE)
                    canvas.paste(drawn, mask=drawn.getchannel("A"))
                    yield canvas


def _drawn(path: Path) -> Image.Image | None:
    """Return a file's picture with its alpha, none if it is tiny, huge or broken."""
    try:
        with Image.open(path) as image:
            if min(image.size) < LEAST_SIDE_PX or image.width * image.height > MOST_PIXELS:
                return None
            drawn = image.convert("RGBA")
    except (OSError, Image.DecompressionBombError):
        return None
    drawn.thumbnail((MOST_SIDE_PX, MOST_SIDE_PX), Image.Resampling.LANCZOS)
    return drawn


def distinct(found: Iterator[Image.Image], count: int) -> list[Image.Image]:
    """Return up to `count` pictures, leaving out each that hardly differs from one before it, or is nearly blank."""
    taken: list[Image.Image] = []
    grey = np.empty((count, GREY_SIDE_PX**2), np.float32)
    for picture in found:
        small = picture.convert("L").resize((GREY_SIDE_PX, GREY_SIDE_PX), Image.Resampling.BOX)
        flat = np.asarray(small, np.float32).ravel()
        gaps = np.square(grey[: len(taken)] - flat).mean(axis=1)
        if flat.std() < DISTINCT_RMS or (len(gaps) and gaps.min() < DISTINCT_RMS**2):
            continue
        grey[len(taken)] = flat
        taken.append(picture)
        if len(taken) == count:
            break
    return taken


class Seen:
    """What dedup knows of pictures: PDQ hashes, whether they tell anything, and thumbnails for the second look."""

    def __init__(self, found: list[Image.Image]) -> None:
        hashes = [pdq(picture) for picture in found]
        self.hashes = np.array([np.frombuffer(bytes.fromhex(one), np.uint64) for one, _ in hashes])
        self.is_sharp = np.array([quality >= DedupConfig().min_quality for _, quality in hashes])
        stored = [_png(picture) for picture in found]
        self.thumbnails = np.array([thumbnail(data) for data in stored])
        self.planes = [plane(data) for data in stored]


def are_pairs(one: Seen, other: Seen, first: Indices, second: Indices, config: DedupConfig) -> npt.NDArray[np.bool_]:
    """Tell which of pictures `first` `[P]` of one and `second` `[P]` of the other dedup takes for the same."""
    near = distances(one.hashes[first], other.hashes[second]) <= config.distance
    found = near & one.is_sharp[first] & other.is_sharp[second]
    at = np.flatnonzero(found)
    looks = one.thumbnails[first[at]], other.thumbnails[second[at]]
    how = ways(*looks, config.confirm_difference)
    found[at] = agree(one, other, first[at], second[at], how, config)
    for cropped in (FIRST_CROPPED, SECOND_CROPPED):
        left = np.flatnonzero(~found[at] & (how.way != NONE))
        crop = crops(looks[0][left], looks[1][left], config.confirm_difference, cropped)
        found[at[left]] = agree(one, other, first[at[left]], second[at[left]], crop, config)
    return found


def agree(
    one: Seen, other: Seen, first: Indices, second: Indices, how: Ways, config: DedupConfig
) -> npt.NDArray[np.bool_]:
    """Tell which pairs that are alike in these ways agree in detail."""
    found = np.asarray(how.way != NONE)
    for pair in np.flatnonzero(found).tolist():
        planes = one.planes[first[pair]], other.planes[second[pair]]
        found[pair] = most_left(*planes, int(how.way[pair]), how.part[pair]) <= config.confirm_detail
    return found


def _png(picture: Image.Image) -> bytes:
    data = io.BytesIO()
    picture.save(data, "PNG", compress_level=1)
    return data.getvalue()


def as_256(values: list[int]) -> Hashes:
    """Return 64-bit hashes as 256-bit ones in which the other bits are 0, `[N, 4]`."""
    hashes = np.zeros((len(values), 4), np.uint64)
    hashes[:, 0] = values
    return hashes


def of_peer(
    hash_of: Callable[[Image.Image], int],
    originals: list[Image.Image],
    copied: Indices,
    copies: dict[str, list[Image.Image]],
) -> dict[str, Any]:
    """Return a peer's recall by way, and its false pairs, at its usual distance and where it has none."""
    hashes = as_256([hash_of(picture) for picture in originals])
    false = np.bincount(all_pairs(hashes, PEER_DISTANCE)[:, 2], minlength=PEER_DISTANCE + 1)
    strict = int(np.flatnonzero(false)[0]) - 1 if false.any() else PEER_DISTANCE
    gaps = {
        way: distances(hashes[copied], as_256([hash_of(picture) for picture in found])) for way, found in copies.items()
    }
    at = {"at_10": PEER_DISTANCE, "without_false_pairs": strict}
    return {
        name: {"distance": most, "false_pairs": int(false[: most + 1].sum()) if most >= 0 else 0}
        | with_mean({way: float((gap <= most).mean()) for way, gap in gaps.items()})
        for name, most in at.items()
    }


def of_ours(originals: Seen, copied: Indices, copies: dict[str, Seen], distance: int) -> dict[str, Any]:
    """Return our recall by way, and our false pairs, where hashes are compared up to a distance."""
    config = DedupConfig(distance=distance)
    sharp = np.flatnonzero(originals.is_sharp)
    first, second, _ = all_pairs(originals.hashes[sharp], distance, threads=2).T
    false = are_pairs(originals, originals, sharp[first], sharp[second], config)
    everyone = np.arange(len(copied))
    recall = {way: float(are_pairs(originals, seen, copied, everyone, config).mean()) for way, seen in copies.items()}
    return {"near_hashes": len(false), "false_pairs": int(false.sum())} | with_mean(recall)


def of_writing(hash_of: dict[str, Callable[[Image.Image], int]]) -> dict[str, dict[str, int]]:
    """Return by kind how many pairs of pictures that differ in writing alone are taken for the same, and by whom."""
    found: dict[str, dict[str, int]] = {}
    for kind, drawn in writing.kinds().items():
        seen = Seen(drawn)
        first, second = np.triu_indices(len(drawn), 1)
        ours = {
            f"within_{bits}": int(are_pairs(seen, seen, first, second, DedupConfig(distance=bits)).sum())
            for bits in DISTANCES
        }
        hashes = {name: as_256([one(picture) for picture in drawn]) for name, one in hash_of.items()}
        peers = {name: int((distances(of[first], of[second]) <= PEER_DISTANCE).sum()) for name, of in hashes.items()}
        found[kind] = {"pairs": len(first)} | ours | peers
    return found


def with_mean(recall: dict[str, float]) -> dict[str, Any]:
    return {"recall": recall, "mean": sum(recall.values()) / len(recall)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pictures", type=Path, nargs="*", default=[])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--copied", type=int, default=1_000)
    parser.add_argument("--imagededup", type=Path, default=IMAGEDEDUP_FOLDER, help=f"folder with {IMAGEDEDUP}")
    options = parser.parse_args()
    imagededup = imagededup_phash(options.imagededup)
    originals = distinct(pictures(options.pictures), options.count)
    copied = np.sort(np.random.default_rng(SEED).permutation(len(originals))[: options.copied])
    copies = {way: [change(originals[at]) for at in copied.tolist()] for way, change in WAYS.items()}
    seen, seen_copies = Seen(originals), {way: Seen(found) for way, found in copies.items()}
    ours = {f"within_{bits}": of_ours(seen, copied, seen_copies, bits) for bits in DISTANCES}
    hash_of: dict[str, Callable[[Image.Image], int]] = {
        "imagehash": lambda picture: int(str(imagehash.phash(picture)), 16),
        "imagededup": lambda picture: int(imagededup.encode_image(image_array=np.asarray(picture)), 16),
    }
    peers = {name: of_peer(one, originals, copied, copies) for name, one in hash_of.items()}
    best = {name: max(peer[name]["mean"] for peer in peers.values()) for name in ("at_10", "without_false_pairs")}
    ratios = {
        f"ratio_{mine}_to_{theirs}": one["mean"] / mean if mean else None
        for mine, one in ours.items()
        for theirs, mean in best.items()
    }
    sizes = {"pictures": len(originals), "copied": len(copied)}
    print(json.dumps({**sizes, **ratios, **ours, "peers": peers, "writing": of_writing(hash_of)}, indent=1))


if __name__ == "__main__":
    main()
