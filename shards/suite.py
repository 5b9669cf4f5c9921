"""Where the pictures of an evaluation folder lie: in CLIP_benchmark's webdatasets, or in files.

test/nshards.txt   how many tars
test/0.tar ...     members KEY.png (jpg, webp), and others of the same key

A folder without `test/nshards.txt` holds picture files, in folders below it too.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from infra.errors import UserError
from infra.storage import Folder, patiently
from shards.sample import IMAGES, split_name
from shards.tar import Member, scan

NSHARDS = "test/nshards.txt"
PICTURE_FILES = (*IMAGES, "jpe", "jfif", "gif", "bmp", "tif", "tiff", "jp2", "ppm", "pgm")
"""Extensions of files that are taken for pictures, in any case; names that begin with a dot are none."""
MOST_TARS = 1_000_000

Samples = dict[str, dict[str, tuple[Member, bytes | None]]]
"""By key: members by extension, with the content of those that were wanted."""


@dataclass(frozen=True)
class SuitePicture:
    """One picture of a suite: its key (of a file its path in the folder), and the bytes of `file` that hold it.

    `size` is None for a whole file, 0 for a sample of a tar that has no picture.
    """

    key: str
    file: str
    start: int = 0
    size: int | None = None


def pictures(folder: Folder) -> list[SuitePicture]:
    """Return a suite's pictures, tar by tar, or by path.

    Raises:
        UserError: no such folder, a tar is missing or damaged, or there is no picture.
    """
    if not folder.exists():
        raise UserError(f"{folder.url}: no such suite folder; give one with {NSHARDS}, or with picture files")
    if folder.exists(NSHARDS):
        found = [_picture(tar, key, sample) for tar in tars(folder) for key, sample in samples_in(folder, tar).items()]
    else:
        found = [SuitePicture(path, path) for path in sorted(_files(folder))]
    if not found:
        above = ", which the folder above has" if folder.exists(NSHARDS.partition("/")[2]) else ""
        raise UserError(
            f"{folder.url}: holds no pictures; give a folder with {NSHARDS}{above}, or with picture files "
            f"({', '.join(PICTURE_FILES[:4])}, ...)"
        )
    return found


def read_picture(folder: Folder, picture: SuitePicture) -> bytes:
    """Return a picture's encoded bytes; an object store may be away for a while. Raises FileNotFoundError."""
    if picture.size is None:
        return folder.read(picture.file)
    start, end = picture.start, picture.start + picture.size
    return patiently(f"{folder.url}: cannot be read", lambda: folder.read_range(picture.file, start, end))


def tars(folder: Folder) -> list[str]:
    """Return the names of a suite's tars. Raises UserError if `test/nshards.txt` is missing or gives no number."""
    count = "".join(lines(folder, NSHARDS))
    if not count.isdecimal() or int(count) > MOST_TARS:
        raise UserError(f"{folder.path(NSHARDS)}: {count!r} is not a number of tars")
    return [f"test/{number}.tar" for number in range(int(count))]


def samples_in(folder: Folder, tar: str, wanted: Callable[[str], bool] | None = None) -> Samples:
    """Return the samples of one of a suite's tars, in its order; contents of members of `wanted` names are read.

    Raises:
        UserError: the tar is missing or damaged.
    """
    where = folder.path(tar)
    samples: Samples = {}
    try:
        with folder.open(tar) as stream:
            for member, content in scan(stream, wanted):
                split = split_name(member.name)
                if split is not None:
                    samples.setdefault(split[0], {})[split[1]] = (member, content)
    except FileNotFoundError:
        raise UserError(f"{where}: missing; {NSHARDS} counts it") from None
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error}); a suite has tars there") from None
    except ValueError as error:
        raise UserError(f"{where}: not a sound tar: {error}") from None
    return samples


def lines(folder: Folder, name: str) -> tuple[str, ...]:
    """Return the lines of one of a suite's text files. Raises UserError if it is missing, empty or no text."""
    try:
        found = lines_of(folder.read(name).decode("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder.path(name)}: missing; a suite needs it") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{folder.path(name)}: not UTF-8 text ({error})") from None
    except OSError as error:
        raise UserError(f"{folder.path(name)}: cannot be read ({error}); a suite is a folder with that file") from None
    if not found:
        raise UserError(f"{folder.path(name)}: empty; a suite needs it")
    return tuple(found)


def lines_of(text: str) -> list[str]:
    """Return a text's lines as Python's `open` has them: other characters that part lines are part of a name."""
    return [line.removesuffix("\n") for line in io.StringIO(text, newline=None)]


def _picture(tar: str, key: str, sample: dict[str, tuple[Member, bytes | None]]) -> SuitePicture:
    extension = next((name for name in IMAGES if name in sample), None)
    if extension is None:
        return SuitePicture(key, tar, 0, 0)
    member = sample[extension][0]
    return SuitePicture(key, tar, member.start, member.size)


def _files(folder: Folder) -> Iterator[str]:
    """Yield the paths of all picture files, each folder gone through once, whatever links lead to it."""
    waiting, seen = [""], set[str]()
    while waiting:
        below = waiting.pop()
        place = folder / below if below else folder
        if place.is_local:
            real = os.path.realpath(place.url)
            if real in seen:
                continue
            seen.add(real)
        for name in place.names():
            if not name.startswith(".") and name.rpartition(".")[2].lower() in PICTURE_FILES:
                yield f"{below}{name}"
        waiting += [f"{below}{name}/" for name in reversed(place.folders()) if not name.startswith(".")]
