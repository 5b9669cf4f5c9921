"""An evaluation suite on disk, as CLIP_benchmark keeps its webdatasets.

classnames.txt                          one class a line; `cls` counts from 0 in this order
zeroshot_classification_templates.txt   one prompt a line, `{c}` where the class goes
test/nshards.txt                        how many tars
test/0.tar ...                          members KEY.png (jpg, webp), KEY.cls, and KEY.txt, one caption a line

A suite for retrieval alone has neither `classnames.txt` nor KEY.cls.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from infra.errors import UserError
from infra.storage import Folder
from shards.sample import FORMATS, IMAGES, UNDECODABLE, split_name
from shards.suite import NSHARDS, lines, lines_of, samples_in, tars
from shards.tar import END, Member, header, padded

CLASSNAMES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
PLACEHOLDER = "{c}"
DECODED_AT_ONCE, THREADS = 64, 8
"""Pictures held decoded, and threads that read and decode them."""

PreparedT = TypeVar("PreparedT")


@dataclass(frozen=True)
class Example:
    """One picture of a suite: its class by number, its captions if the suite is for retrieval, and where it lies."""

    key: str
    target: int | None
    captions: tuple[str, ...]
    tar: str
    extension: str
    start: int
    size: int


ReadTar = Callable[[str], list[Example]]


@dataclass(frozen=True)
class Suite:
    """Class names (none in a suite for retrieval alone), prompt templates, and what is known of each picture."""

    path: str
    names: tuple[str, ...]
    templates: tuple[str, ...]
    examples: tuple[Example, ...]

    @property
    def is_captioned(self) -> bool:
        """Tell whether every picture has a caption."""
        return all(example.captions for example in self.examples)

    @property
    def targets(self) -> Tensor:
        """The pictures' classes `[N]`, of a suite with names."""
        return torch.tensor([example.target for example in self.examples])

    def pictures(self, examples: Sequence[Example], prepare: Callable[[Image.Image], PreparedT]) -> Iterator[PreparedT]:
        """Yield what `prepare` makes of each example's picture (RGB); a few are read and decoded at once.

        Raises:
            UserError: one is not a picture, or its tar has gone.
        """
        folder = Folder(self.path)
        with ThreadPoolExecutor(THREADS, thread_name_prefix="suite") as threads:
            for start in range(0, len(examples), DECODED_AT_ONCE):
                some = examples[start : start + DECODED_AT_ONCE]
                yield from threads.map(lambda one: prepare(_picture(folder, one)), some)


def read_suite(
    path: str, spread: Callable[[ReadTar, Sequence[str]], Iterable[list[Example]]] = lambda read, tars: map(read, tars)
) -> Suite:
    """Read all of a suite folder but its pictures.

    Args:
        path: folder, any fsspec URL.
        spread: calls a function on each of some names and returns what came of them, in order; by default here.

    Raises:
        UserError: a file is missing or is not what it should be; the message names it.
    """
    folder = Folder(path)
    if not folder.exists():
        raise UserError(f"{path}: no such suite folder; give one with {CLASSNAMES} and {NSHARDS}")
    names = lines(folder, CLASSNAMES) if folder.exists(CLASSNAMES) or not folder.exists(NSHARDS) else ()
    templates = lines(folder, TEMPLATES) if folder.exists(TEMPLATES) else (PLACEHOLDER,)
    for template in templates:
        if PLACEHOLDER not in template:
            raise UserError(f"{folder.path(TEMPLATES)}: {template!r} has no {PLACEHOLDER} for the class name")
    examples = [one for some in spread(partial(_examples, folder, len(names)), tars(folder)) for one in some]
    if not examples:
        raise UserError(f"{folder.path('test')}: holds no pictures")
    return Suite(folder.url, names if _is_classed(folder, examples) else (), templates, tuple(examples))


def _is_classed(folder: Folder, examples: Sequence[Example]) -> bool:
    """Tell whether pictures have classes. Raises UserError if only some have, or one has no caption either."""
    classed = any(example.target is not None for example in examples)
    for example in examples:
        where = f"{folder.path(example.tar)}: {example.key}"
        if classed and example.target is None:
            raise UserError(f"{where} has no {example.key}.cls, as other pictures have; give it one")
        if not classed and not example.captions:
            raise UserError(
                f"{where} has neither a class ({example.key}.cls, counting in {CLASSNAMES}) nor a caption "
                f"({example.key}.txt); a suite needs one of the two for every picture"
            )
    return classed


def check_suite(path: str, *, decode: bool) -> None:
    """Raise UserError if a suite cannot be measured on; with `decode`, every picture is looked at too."""
    suite = read_suite(path)
    if decode:
        for _ in suite.pictures(suite.examples, lambda picture: picture.size):
            pass


def write_suite(
    path: str, samples: Iterable[Mapping[str, Any]], classnames: Sequence[str], templates: Sequence[str]
) -> None:
    """Write a suite folder with one tar; `classnames.txt` comes last, so a suite that has it is whole.

    Args:
        path: folder, any fsspec URL.
        samples: mappings with `key`, an image's bytes under its extension (`png`, `jpg`, `webp`), `cls`, and
            for retrieval `txt`, one caption a line.
        classnames: names of the classes, in the order that `cls` counts; none for retrieval alone.
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
    if not classnames:
        return
    folder.write(TEMPLATES, "".join(f"{template}\n" for template in templates).encode())
    folder.write(CLASSNAMES, "".join(f"{name}\n" for name in classnames).encode())


def _examples(folder: Folder, classes: int, tar: str) -> list[Example]:
    """Read the table of a tar: classes, captions, and where the pictures lie."""
    samples = samples_in(folder, tar, _is_text)
    return [_example(folder.path(tar), tar, key, sample, classes) for key, sample in samples.items()]


def _is_text(name: str) -> bool:
    split = split_name(name)
    return split is not None and split[1] in ("cls", "txt")


def _example(where: str, tar: str, key: str, sample: dict[str, tuple[Member, bytes | None]], classes: int) -> Example:
    extension = next((name for name in IMAGES if name in sample), None)
    if extension is None:
        raise UserError(f"{where}: {key} has no picture ({', '.join(IMAGES)})")
    texts = {name: content.decode("utf-8", "replace") for name, (_, content) in sample.items() if content is not None}
    target = texts["cls"].strip() if "cls" in texts else None
    if target is not None and not classes:
        raise UserError(f"{where}: {key}.cls holds {target!r}, but {CLASSNAMES}: missing; write one class a line there")
    if target is not None and (not target.isdecimal() or int(target) >= classes):
        raise UserError(f"{where}: {key}.cls holds {target!r}, not a class from 0 to {classes - 1}")
    captions = tuple(line for line in lines_of(texts.get("txt", "")) if line.strip())
    member = sample[extension][0]
    return Example(key, None if target is None else int(target), captions, tar, extension, member.start, member.size)


def _picture(folder: Folder, example: Example) -> Image.Image:
    where = folder.path(example.tar)
    try:
        data = folder.read_range(example.tar, example.start, example.start + example.size)
    except FileNotFoundError:
        raise UserError(f"{where}: missing; {NSHARDS} counts it") from None
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.convert("RGB")
    except UNDECODABLE as error:
        raise UserError(f"{where}: {example.key}.{example.extension} is not a picture ({error})") from None
