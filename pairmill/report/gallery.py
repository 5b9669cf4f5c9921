"""Zero-shot predictions, right and wrong, with the names a model thought of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from infra.errors import RunError
from infra.storage import Folder
from pairmill.report.pictures import Album, Picture
from pairmill.report.rows import SEED
from pairmill.report.wording import NAME_CHARACTERS, label, percent, plain
from shards.sample import IMAGES, split_name
from shards.tar import scan

SHOWN = 9
"""Predictions shown of each kind, right and wrong."""
SUITES = 8
TARS = 64
"""Tars of a suite looked through for the pictures."""


@dataclass(frozen=True)
class Guess:
    """One of the names thought of: its probability (or cosine, where a result has no other), its bar's width."""

    name: str
    value: str
    width: float
    is_right: bool


@dataclass(frozen=True)
class Prediction:
    """A picture, its true name and the best names, best first."""

    name: str
    picture: Picture | None
    guesses: tuple[Guess, ...]


@dataclass(frozen=True)
class SuiteResult:
    """What a model reached on one suite, and some of its predictions; one without classes has recalls alone."""

    title: str
    names: int
    images: int
    top1: float | None
    top5: float | None
    retrieval: tuple[tuple[str, tuple[tuple[str, float], ...]], ...]
    right: tuple[Prediction, ...]
    wrong: tuple[Prediction, ...]
    right_count: int
    wrong_count: int

    @property
    def chance(self) -> float:
        """Top-1 accuracy of blind guessing."""
        return 1 / max(1, self.names)

    @property
    def headline(self) -> tuple[float, str]:
        """The one share that tells most of it, and what that is a share of."""
        if self.top1 is not None:
            return self.top1, f"top-1 of {self.names:,} names, chance\u00a0{percent(self.chance)}"
        way, cuts = self.retrieval[0]
        return cuts[0][1], f"{way} {cuts[0][0]} of {self.images:,} pictures"


def gallery(run: Folder, album: Album) -> list[SuiteResult]:
    """Return what is in the run's folder `evaluation`, each with a seeded sample of its predictions."""
    folder = run / "evaluation"
    results = []
    for name in folder.names(".json")[:SUITES]:
        content = folder.read_json(name)
        if isinstance(content, dict) and ({"names", "top1", "top5"} <= content.keys() or content.get("retrieval")):
            results.append(_suite(name.removesuffix(".json"), content, album))
    return results


def _suite(name: str, content: Mapping[str, Any], album: Album) -> SuiteResult:
    predictions = [one for one in content.get("predictions") or [] if one.get("top")]
    right = [one for one in predictions if one["top"][0]["name"] == one["name"]]
    wrong = [one for one in predictions if one["top"][0]["name"] != one["name"]]
    shown = _sample(right, 0), _sample(wrong, 1)
    pictures = _pictures(content.get("suite"), predictions, [*shown[0], *shown[1]])
    scale = max((_value(guess)[0] for one in (*shown[0], *shown[1]) for guess in one["top"]), default=1.0)
    drawn = [tuple(_prediction(one, pictures, scale, album) for one in kind) for kind in shown]
    recalls = content.get("retrieval") or {}
    return SuiteResult(
        label(name), int(content.get("names", 0)), int(content.get("images", len(predictions))),
        _share(content, "top1"), _share(content, "top5"),
        tuple((way.replace("_", " "), tuple((cut, float(value)) for cut, value in found.items()))
              for way, found in recalls.items()),
        drawn[0], drawn[1], len(right), len(wrong),
    )  # fmt: skip


def _share(content: Mapping[str, Any], name: str) -> float | None:
    return float(content[name]) if name in content else None


def _sample(predictions: Sequence[dict[str, Any]], stream: int) -> list[dict[str, Any]]:
    order = np.random.default_rng([SEED, stream]).permutation(len(predictions))
    return [predictions[at] for at in np.sort(order[:SHOWN])]


def _value(guess: Mapping[str, Any]) -> tuple[float, bool]:
    """Return a guess' probability, or its score and False."""
    share = guess.get("probability")
    return (float(share), True) if share is not None else (max(0.0, float(guess.get("score", 0.0))), False)


def _prediction(one: Mapping[str, Any], pictures: Mapping[str, bytes], scale: float, album: Album) -> Prediction:
    name = plain(one["name"], NAME_CHARACTERS)
    body = pictures.get(one["key"])
    guesses = []
    for guess in one["top"][:5]:
        value, is_share = _value(guess)
        text = f"{value:.0%}" if is_share and value >= 0.1 else f"{value:.1%}" if is_share else f"{value:.2f}"
        width = round(100 * value / scale, 1) if scale else 0.0
        guesses.append(Guess(plain(guess["name"], NAME_CHARACTERS), text, width, guess["name"] == one["name"]))
    return Prediction(name, album.take(body, name) if body else None, tuple(guesses))


def _pictures(
    suite: str | None, predictions: Sequence[Mapping[str, Any]], wanted: Sequence[Mapping[str, Any]]
) -> dict[str, bytes]:
    """Return the pictures of some predictions by key, from the suite's tars, of which only they are read.

    A key that the suite has twice is left out: which picture it was cannot be told.
    """
    if not suite or not wanted:
        return {}
    folder = Folder(suite)
    times = Counter(one["key"] for one in predictions)
    keys = {one["key"] for one in wanted if times[one["key"]] == 1}

    def is_wanted(name: str) -> bool:
        split = split_name(name)
        return split is not None and split[0] in keys and split[1] in IMAGES

    found: dict[str, bytes] = {}
    for number in range(TARS):
        if len(found) == len(keys):
            break
        try:
            with folder.open(f"test/{number}.tar") as stream:
                for member, content in scan(stream, is_wanted):
                    split = split_name(member.name)
                    if content is not None and split is not None:
                        found.setdefault(split[0], content)
        except (OSError, ValueError, RunError):
            break
    return found
