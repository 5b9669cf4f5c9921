"""What the pictures of evaluation suites are compared by: digests of their bodies, and PDQ hashes."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from dedup.choose import Indices
from dedup.confirm import squeezed
from dedup.hamming import WORDS, Hashes
from dedup.same_look import THUMBNAIL_PX, Thumbnails
from infra.errors import UserError
from infra.logs import log, progress
from infra.storage import Folder
from shards.pdq import PDQ_SIDE_PX, pdq
from shards.sample import FORMATS, UNDECODABLE
from shards.suite import SuitePicture, pictures, read_picture

SHA256_BYTES = 32
_AT_ONCE = 1024
"""Pictures handed to the threads at a time."""


@dataclass(frozen=True)
class Framing:
    """What ingest made of a picture's shape: what it cut off or put around it, and the colour behind it."""

    resize: str = "keep_ratio"
    background: str = "#ffffff"

    @classmethod
    def of(cls, ingest: Mapping[str, Any]) -> Framing:
        """Return that of a corpus, from what its manifest records of `ingest`."""
        image = ingest.get("image", {})
        return cls(image.get("resize", cls.resize), image.get("background", cls.background))

    def shown(self, data: bytes) -> Image.Image:
        """Return an encoded picture as a corpus of this framing would show it, RGB, its shorter side 256 at most.

        Raises:
            one of `shards.sample.UNDECODABLE`: it is none that can be decoded.
        """
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.draft(None, (2 * PDQ_SIDE_PX, 2 * PDQ_SIDE_PX))
            pixels = self._framed(self._flat(_upright(_eight_bits(image))))
        scale = PDQ_SIDE_PX / min(pixels.size)
        if scale >= 1:
            return pixels
        size = (max(1, round(pixels.width * scale)), max(1, round(pixels.height * scale)))
        return pixels.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)

    def _flat(self, image: Image.Image) -> Image.Image:
        if not image.has_transparency_data:
            return image.convert("RGB")
        drawn = image.convert("RGBA")
        ground = Image.new("RGB", drawn.size, self.background)
        ground.paste(drawn, mask=drawn.getchannel("A"))
        return ground

    def _framed(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        if self.resize == "center_crop":
            side = min(width, height)
            left, top = (width - side) // 2, (height - side) // 2
            return image.crop((left, top, left + side, top + side))
        if self.resize == "border" and width != height:
            side = max(width, height)
            ground = Image.new("RGB", (side, side), self.background)
            ground.paste(image, ((side - width) // 2, (side - height) // 2))
            return ground
        return image


@dataclass(frozen=True)
class Suites:
    """The `F` pictures of some suites, one suite after the other; a broken picture has neither digest nor hash."""

    names: tuple[str, ...]  # as they were given
    suite: npt.NDArray[np.int32]  # [F], index into `names`
    pictures: tuple[SuitePicture, ...]
    sha256: npt.NDArray[np.bytes_]  # [F], of the body
    phash: Hashes  # [F, 4]
    quality: npt.NDArray[np.int16]  # [F], -1 without a hash
    is_broken: npt.NDArray[np.bool_]  # [F]

    def __len__(self) -> int:
        return len(self.pictures)

    def thumbnails(self, some: Indices, framing: Framing, threads: int) -> Thumbnails:
        """Return the thumbnails `[n, 64, 64, 3]` of `some` pictures `[n]`. Raises UserError if one has changed."""
        found = np.empty((len(some), THUMBNAIL_PX, THUMBNAIL_PX, 3), np.uint8)
        folders = [Folder(name) for name in self.names]

        def draw(place: int) -> None:
            number = int(some[place])
            picture, suite = self.pictures[number], int(self.suite[number])
            try:
                found[place] = squeezed(framing.shown(read_picture(folders[suite], picture)))
            except UNDECODABLE as error:
                raise UserError(
                    f"{self.names[suite]}: {picture.key} has changed since it was hashed{_why(error)}; leave the suite "
                    "as it is and run the same again"
                ) from None

        with ThreadPoolExecutor(threads, thread_name_prefix="suite") as pool:
            for start in range(0, len(some), _AT_ONCE):
                for _ in pool.map(draw, range(start, min(len(some), start + _AT_ONCE))):
                    pass
        return found


@dataclass(frozen=True)
class Listed:
    """Suites, and where the pictures of each lie."""

    names: tuple[str, ...]
    pictures: tuple[tuple[SuitePicture, ...], ...]  # of each suite


def list_suites(names: Sequence[str]) -> Listed:
    """Find the pictures of suites; none is read, so that a mistake in a name is told at once.

    Raises:
        UserError: no such folder, or no picture in it; a tar is missing or damaged.
    """
    return Listed(tuple(names), tuple(tuple(pictures(Folder(name))) for name in names))


def read_suites(suites: Listed, framing: Framing, threads: int) -> Suites:
    """Read and hash the pictures of suites; one that cannot be decoded is named in the log and counts as broken.

    Raises:
        UserError: a suite has no picture that can be decoded.
    """
    names = suites.names
    listed = [(number, one) for number, found in enumerate(suites.pictures) for one in found]
    count = len(listed)
    sha256, is_broken = np.zeros(count, f"S{SHA256_BYTES}"), np.zeros(count, bool)
    phash, quality = np.zeros((count, WORDS), np.uint64), np.full(count, -1, np.int16)
    for place, found in enumerate(_hashed(names, listed, framing, threads)):
        is_broken[place] = found is None
        if found is not None:
            sha256[place], quality[place] = found[0], found[2]
            phash[place] = np.frombuffer(bytes.fromhex(found[1]), np.uint64)
    suite = np.asarray([number for number, _ in listed], np.int32)
    for number, name in enumerate(names):
        if is_broken[suite == number].all():
            raise UserError(f"{name}: none of its {(suite == number).sum()} pictures can be decoded; see the log above")
    return Suites(names, suite, tuple(one for _, one in listed), sha256, phash, quality, is_broken)


def _hashed(
    names: Sequence[str], listed: Sequence[tuple[int, SuitePicture]], framing: Framing, threads: int
) -> Iterator[tuple[bytes, str, int] | None]:
    """Yield of each picture its body's digest, its hash in hex and the hash's quality; None if it is broken."""
    folders = [Folder(name) for name in names]

    def one(task: tuple[int, SuitePicture]) -> tuple[bytes, str, int] | None:
        suite, picture = task
        try:
            data = read_picture(folders[suite], picture)
            return hashlib.sha256(data).digest(), *pdq(framing.shown(data))
        except UNDECODABLE as error:
            what = _why(error) if picture.size != 0 else " (its sample has none)"
            log.warning("%s: %s is no sound picture%s; mend it or take it out", names[suite], picture.key, what)
            return None

    with (
        progress("dedup: test pictures", len(listed), "pictures") as meter,
        ThreadPoolExecutor(threads, thread_name_prefix="suite") as pool,
    ):
        for start in range(0, len(listed), _AT_ONCE):
            for found in pool.map(one, listed[start : start + _AT_ONCE]):
                meter.advance(1)
                yield found


def _why(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):  # its text is the address of a buffer
        return ""
    return f" ({' '.join(str(error).split())[:200]})"


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except UNDECODABLE:  # damaged metadata do not make the picture worthless
        return image


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
