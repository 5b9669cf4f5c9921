"""Measures a model while it is trained: every rank reads and encodes its share of a suite, and ranks its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from infra.storage import Folder
from train.evaluate.retrieval import CUTS, distinct, recall
from train.evaluate.run import Encoder
from train.evaluate.suite import Suite, read_suite
from train.evaluate.zero_shot import accuracy, classifier
from train.parallel import mean_over_ranks, rank, world_size
from train.state import TrainingState
from train.tokenizer import Tokenizer, load_tokenizer

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class Measurement:
    """Measures a run's weights as they are (or their average) on its suite, whose table is read the first time.

    Args:
        state: the run.
        run: its folder, which has the vocabulary.
    """

    def __init__(self, state: TrainingState, run: Path) -> None:
        self.state, self.run = state, run
        self._known: tuple[Suite, Tokenizer] | None = None

    def __call__(self) -> dict[str, float]:
        """Measure; every rank must call it.

        Returns:
            For a suite with classes `zero_shot` and `zero_shot_top5` (shares), for one with captions
            `image_to_text_recall@K` and `text_to_image_recall@K`, the same on every rank.
        """
        state = self.state
        if self._known is None:
            suite = read_suite(state.config.evaluate.suite, map_over_ranks)
            self._known = suite, load_tokenizer(Folder(self.run))
        suite, tokenizer = self._known
        averaged = state.average.applied_to(state.model) if state.average is not None else nullcontext()
        with averaged, torch.no_grad():
            found = _measured(Encoder(state.model, tokenizer, state.config, state.device), suite)
        state.parallel.train()
        return found


def map_over_ranks(function: Callable[[ItemT], ResultT], items: Sequence[ItemT]) -> list[ResultT]:
    """Return what the function gives for each item, in order, each worked out by one rank."""
    own = [function(item) for item in items[rank() :: world_size()]]
    if world_size() == 1:
        return own
    parts: list[list[ResultT]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, own)
    return [parts[number % world_size()][number // world_size()] for number in range(len(items))]


def by_all_ranks(encode: Callable[[Sequence[ItemT]], Tensor], items: Sequence[ItemT]) -> Tensor:
    """Return the features `[N, D]` of all items, each encoded by one rank.

    Every rank encodes equally many, some a second time: a sharded model needs all ranks at each of its layers.
    """
    if world_size() == 1:
        return encode(items)
    share = -(-len(items) // world_size())
    numbers = [(rank() + place * world_size()) % len(items) for place in range(share)]
    own = encode([items[number] for number in numbers]).contiguous()
    parts = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(parts, own)
    return torch.stack(parts, dim=1).flatten(0, 1)[: len(items)]


def _measured(encoder: Encoder, suite: Suite) -> dict[str, float]:
    features = by_all_ranks(partial(encoder.images, suite), suite.examples)
    found: dict[str, float] = {}
    if suite.names:
        weights = classifier(lambda texts: by_all_ranks(encoder.texts, texts), suite.names, suite.templates)
        scores, targets = features @ weights.T, suite.targets.to(features.device)
        found = {"zero_shot": accuracy(scores, targets, 1), "zero_shot_top5": accuracy(scores, targets, 5)}
    if suite.is_captioned:
        texts, belongs = distinct([example.captions for example in suite.examples])
        text_features = by_all_ranks(encoder.texts, texts)
        ways = {"image_to_text": (features, text_features, belongs),
                "text_to_image": (text_features, features, belongs.T)}  # fmt: skip
        for way, sides in ways.items():
            found |= {f"{way}_{name}": share for name, share in _recalls(*sides).items()}
    return found


def _recalls(rows: Tensor, columns: Tensor, belongs: Tensor) -> dict[str, float]:
    """Return recalls over all rows, this rank having looked at its share of them; see `recall`."""
    share = slice(rank(), None, world_size())
    own, counts = rows[share], [0.0] * len(CUTS)
    if len(own):
        found = recall(own @ columns.T, belongs[share].to(rows.device))
        counts = [value * len(own) for value in found.values()]
    sums = [round(mean * world_size()) for mean in mean_over_ranks(counts)]
    return {f"recall@{cut}": total / len(rows) for cut, total in zip(CUTS, sums, strict=True)}
