"""An evaluation suite on disk, as CLIP_benchmark keeps its webdatasets.

classnames.txt                          one class a line; `cls` counts from 0 in this order
zeroshot_classification_templates.txt   one prompt a line, `{c}` where the class goes
test/nshards.txt                        how many tars
test/0.tar ...                          members KEY.png (jpg, webp), KEY.cls, and KEY.txt for retrieval
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from infra.errors import UserError
from infra.storage import Folder
from shards.sample import IMAGES, split_name
from shards.tar import END, header, members, padded

CLASSNAMES, TEMPLATES, NSHARDS = "classnames.txt", "zeroshot_classification_templates.txt", "test/nshards.txt"
PLACEHOLDER = "{c}"


@dataclass(frozen=True)
class Example:
    """One picture of a suite: its class by number, and its caption if the suite is for retrieval."""

    key: str
    image: Image.Image
    target: int
    caption: str | None


@dataclass(frozen=True)
class Suite:
    """Class names, prompt templates, and pictures."""

    path: str
    names: tuple[str, ...]
    templates: tuple[str, ...]
    examples: tuple[Example, ...]


def read_suite(path: str) -> Suite:
    """Read a suite folder.

    Raises:
        UserError: a file is missing or is not what it should be; the message names it.
    """
    folder = Folder(path)
    if not folder.exists():
        raise UserError(f"{path}: no such suite folder; give one with {CLASSNAMES} and {NSHARDS}")
    names = _lines(folder, CLASSNAMES)
    templates = _lines(folder, TEMPLATES) if folder.exists(TEMPLATES) else (PLACEHOLDER,)
    for template in templates:
        if PLACEHOLDER not in template:
            raise UserError(f"{folder.path(TEMPLATES)}: {template!r} has no {PLACEHOLDER} for the class name")
    count = "".join(_lines(folder, NSHARDS))
    if not count.isdigit():
        raise UserError(f"{folder.path(NSHARDS)}: {count!r} is not a number of tars")
    examples = [
        example for shard in range(int(count)) for example in _examples(folder, f"test/{shard}.tar", len(names))
    ]
    if not examples:
        raise UserError(f"{folder.path('test')}: holds no pictures")
    return Suite(folder.url, names, templates, tuple(examples))


def write_suite(
    path: str, samples: Iterable[Mapping[str, Any]], classnames: Sequence[str], templates: Sequence[str]
) -> None:
    """Write a suite folder with one tar; `classnames.txt` comes last, so a suite that has it is whole.

    Args:
        path: folder, any fsspec URL.
        samples: mappings with `key`, an image's bytes under its extension (`png`, `jpg`, `webp`), `cls`, and
            for retrieval `txt`.
        classnames: names of the classes, in the order that `cls` counts.
        templates: prompts with `{c}`.
    """
    folder = Folder(path)
    with folder.create("test/0.tar") as tar:
        for sample in samples:
            for name, value in sample.items():
                if name != "key":
                    data = value if isinstance(value, bytes) else str(value).encode()
                    tar.write(
                        header(f"{sample['key']}.{name}", len(data)) + data + bytes(padded(len(data)) - len(data))
                    )
        tar.write(END)
    folder.write(NSHARDS, b"1\n")
    folder.write(TEMPLATES, "".join(f"{template}\n" for template in templates).encode())
    folder.write(CLASSNAMES, "".join(f"{name}\n" for name in classnames).encode())


def _lines(folder: Folder, name: str) -> tuple[str, ...]:
    try:
        lines = folder.read(name).decode("utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"{folder.path(name)}: missing; a suite needs it") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{folder.path(name)}: not UTF-8 text ({error})") from None
    if not lines:
        raise UserError(f"{folder.path(name)}: empty; a suite needs it")
    return tuple(lines)


def _examples(folder: Folder, name: str, classes: int) -> Iterator[Example]:
    try:
        data = folder.read(name)
        found = members(data)
    except FileNotFoundError:
        raise UserError(f"{folder.path(name)}: missing; {NSHARDS} counts it") from None
    except ValueError as error:
        raise UserError(f"{folder.path(name)}: not a sound tar: {error}") from None
    samples: dict[str, dict[str, bytes]] = {}
    for member in found:
        split = split_name(member.name)
        if split is not None:
            samples.setdefault(split[0], {})[split[1]] = data[member.start : member.start + member.size]
    for key, sample in samples.items():
        yield _example(folder.path(name), key, sample, classes)


def _example(where: str, key: str, sample: dict[str, bytes], classes: int) -> Example:
    extension = next((name for name in IMAGES if name in sample), None)
    if extension is None:
        raise UserError(f"{where}: {key} has no picture ({', '.join(IMAGES)})")
    target = sample.get("cls", b"").decode("utf-8", "replace").strip()
    if not target.isdigit() or int(target) >= classes:
        raise UserError(f"{where}: {key}.cls holds {target!r}, not a class from 0 to {classes - 1}")
    try:
        image = Image.open(io.BytesIO(sample[extension])).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{where}: {key}.{extension} is not a picture ({error})") from None
    caption = sample["txt"].decode("utf-8", "replace") if "txt" in sample else None
    return Example(key, image, int(target), caption)
