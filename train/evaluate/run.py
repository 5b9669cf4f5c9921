"""Measures a checkpoint on a suite: classification, retrieval and the predictions themselves."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from infra.config import parse
from infra.errors import RunError, UserError
from train import checkpoint
from train.augment import normalise
from train.config import RunConfig
from train.evaluate.retrieval import distinct, retrieval
from train.evaluate.suite import Example, Suite, read_suite
from train.evaluate.zero_shot import accuracy, classifier
from train.model import DualEncoder, create_model
from train.precision import autocast, chosen, laid_out
from train.tokenizer import Tokenizer, load_tokenizer, pad

BATCH = 256
SHOWN = 5
"""Names given for each picture, best first."""


def evaluate(checkpoint_path: str | Path, suite: str | Path) -> dict[str, Any]:
    """Measure a run's newest checkpoint, or one named checkpoint, on a suite folder.

    Returns:
        `names` (how many classes), `images`, `top1`, `top5` (shares; not for a suite without classes), `retrieval`
        (`image_to_text`, `text_to_image`: `recall@1`, `@5`, `@10`; None for a suite without captions),
        `predictions` (for each picture `key`, its true `name`, its `top` five as `name`, `score`, a cosine, and
        `probability` among all names at the model's own temperature; none without classes), `step`, `samples`.

    Raises:
        UserError: no checkpoint there, a suite that is missing or malformed, a checkpoint of another model.
        RunError: no checkpoint of the run is sound.
    """
    checkpoint.find(checkpoint_path)  # named before the suite: it is the one typed first
    pictures = read_suite(str(suite))
    model, tokenizer, config, state = load_model(checkpoint_path)
    return measure(model, tokenizer, pictures, config) | {"step": state["step"], "samples": state["samples"]}


def load_model(path: str | Path) -> tuple[DualEncoder, Tokenizer, RunConfig, dict[str, Any]]:
    """Return a trained model (averaged weights, if there are any), its tokenizer, configuration and state.

    Raises:
        UserError: no checkpoint there, or one of another model.
        RunError: it is torn.
    """
    folder, where = checkpoint.find(path)
    if not folder.exists("config.json"):
        raise UserError(f"{folder.path('config.json')}: missing; a checkpoint is read with its run's configuration")
    config = parse(folder.read_json("config.json"), RunConfig, source=folder.path("config.json"))
    tokenizer = load_tokenizer(folder)
    weights = ("model", "average")
    one = where.exists(checkpoint.META)
    state = checkpoint.load(where.url, weights) if one else checkpoint.load_newest(where, weights)
    if state is None:
        raise RunError(f"{where.url}: its checkpoints have gone")
    model = create_model(config.model, tokenizer.vocabulary)
    checkpoint.load_weights(model, state.get("average", state["model"]), where.url)
    return model, tokenizer, config, state


@torch.no_grad()
def measure(model: DualEncoder, tokenizer: Tokenizer, suite: Suite, config: RunConfig) -> dict[str, Any]:
    """Measure a model in memory on a suite; see `evaluate` for what comes back."""
    encoder = Encoder(model, tokenizer, config, next(model.parameters()).device)
    features = encoder.images(suite, suite.examples)
    shares, predictions, recalls = {}, [], None
    if suite.names:
        scores = features @ classifier(encoder.texts, suite.names, suite.templates).T
        shares = {"top1": accuracy(scores, suite.targets, 1), "top5": accuracy(scores, suite.targets, 5)}
        predictions = _predictions(suite, scores, model.logit_scale.exp().item())
    if suite.is_captioned:
        texts, belongs = distinct([example.captions for example in suite.examples])
        recalls = retrieval(features, encoder.texts(texts), belongs)
    counts = {"names": len(suite.names), "images": len(suite.examples)}
    return counts | shares | {"retrieval": recalls, "predictions": predictions}


class Encoder:
    """Texts and pictures to unit features, in batches and in the run's arithmetic.

    Args:
        model: in evaluation mode from here on.
        tokenizer: cuts texts.
        config: the run.
        device: where the model computes, which need not be where its parameters lie between two calls.
    """

    def __init__(self, model: DualEncoder, tokenizer: Tokenizer, config: RunConfig, device: torch.device) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.side = config.data.image_size
        self.channels_last = config.parallel.channels_last
        self.device = device
        self.dtype = chosen(config.parallel.precision, device)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return unit features `[N, D]` of texts."""
        rows = [self.tokenizer.encode(text, self.model.context_length) for text in texts]
        with autocast(self.dtype, self.device):
            parts = [
                self.model.encode_text(pad(rows[start : start + BATCH]).to(self.device), normalize=True)
                for start in range(0, len(rows), BATCH)
            ]
        return torch.cat(parts)

    @torch.no_grad()
    def images(self, suite: Suite, examples: Sequence[Example]) -> Tensor:
        """Return unit features `[N, D]` of a suite's pictures; a batch of them is in memory at a time."""
        squares = suite.pictures(examples, partial(square, side=self.side))
        parts = []
        while some := list(islice(squares, BATCH)):
            parts.append(self.squares(some))
        return torch.cat(parts)

    @torch.no_grad()
    def squares(self, some: Sequence[np.ndarray]) -> Tensor:
        """Return unit features `[N, D]` of uint8 RGB pictures `[side, side, 3]`, as one batch."""
        batch = normalise(torch.from_numpy(np.stack(some)).permute(0, 3, 1, 2).to(self.device))
        with autocast(self.dtype, self.device):
            return self.model.encode_image(laid_out(batch, self.channels_last), normalize=True)


def square(image: Image.Image, side: int) -> np.ndarray:
    """Scale the shorter side to `side` pixels and take the centre, as CLIP does: uint8 `[side, side, 3]`."""
    width, height = image.size
    crop = min(width, height)
    left, upper = (width - crop) / 2, (height - crop) / 2
    box = (left, upper, left + crop, upper + crop)
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box=box))


def _predictions(suite: Suite, scores: Tensor, scale: float) -> list[dict[str, Any]]:
    best = scores.topk(min(SHOWN, scores.shape[1]), dim=1)
    shares = (scale * scores.float()).softmax(dim=1).gather(1, best.indices)
    columns = (best.indices.tolist(), best.values.tolist(), shares.tolist())
    return [
        {
            "key": example.key,
            "name": suite.names[target],
            "top": [
                {"name": suite.names[number], "score": round(score, 4), "probability": round(share, 4)}
                for number, score, share in zip(*row, strict=True)
            ],
        }
        for example, target, *row in zip(suite.examples, suite.targets.tolist(), *columns, strict=True)
    ]
