"""A sample as training takes it: its picture cropped, its caption cut into token ids; runs where the stream decodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info

from shards.pictures import decoded_jpeg, resized
from shards.sample import IMAGES
from shards.stream import Sample
from train.augment import DRAWS, AugmentConfig, crop_box, draws
from train.config import DataConfig
from train.pictures import DecodedCache
from train.tokenizer import Tokenizer

TOKENIZED_TEXTS = 65_536
"""Captions whose token ids are kept at hand, in each process that prepares."""


class Preparation:
    """A stream's `decode`: puts `crop`, `draws` and `ids` in the place of a sample's members.

    Args:
        config: sides of the pictures and how they are decoded.
        crop: how pictures are cropped.
        tokenizer: cuts captions.
        context: longest text, tokens.
        steps_per_epoch: steps of an epoch, to know how far the run is.
        captions: those to take instead of the samples' own, by number in the folder.
        patch_draws: uniform numbers that a sample draws for patch dropout, after the `DRAWS`.
    """

    def __init__(
        self,
        config: DataConfig,
        crop: AugmentConfig,
        tokenizer: Tokenizer,
        context: int,
        *,
        steps_per_epoch: int,
        captions: Sequence[str] | None = None,
        patch_draws: int = 0,
    ) -> None:
        self.config, self.crop, self.tokenizer, self.context = config, crop, tokenizer, context
        self.steps_per_epoch, self.captions = steps_per_epoch, captions
        self.draws = DRAWS + patch_draws
        self.total = 0  # samples of the whole run, of which `early_share` is a share
        self._cache = DecodedCache(config.cache_bytes // max(1, config.workers), crop.margin)
        self._ids: dict[str, list[int]] = {}

    def __call__(self, sample: Sample) -> None:
        """Prepare a sample in place. Raises BadSampleError if its picture cannot be decoded."""
        numbers = draws(self.config.seed, sample["__epoch__"], [sample["__key__"]], self.draws)[0]
        sample["crop"] = self._cropped(sample, numbers)
        sample["draws"], sample["ids"] = numbers, self._tokens(sample)
        for name in [name for name in sample if name in IMAGES or name in ("txt", "json")]:
            del sample[name]

    def side(self, epoch: int, step: int) -> int:
        """Return the side of the pictures of a step, pixels."""
        seen = (epoch * self.steps_per_epoch + step) * self.config.global_batch_size
        is_early = self.config.early_image_size and seen < self.config.early_share * self.total
        return self.config.early_image_size if is_early else self.config.image_size

    def _cropped(self, sample: Sample, numbers: NDArray[np.float32]) -> NDArray[np.uint8]:
        side = self.side(sample["__epoch__"], sample["__step__"])
        if self.config.decoder == "turbo" and not self.crop.margin:
            pixels = decoded_jpeg(next(sample[name] for name in IMAGES if name in sample))
            if pixels is not None:
                left, upper, right, lower = crop_box((pixels.shape[1], pixels.shape[0]), numbers, self.crop)
                whole = (int(left), int(upper), max(int(left) + 1, round(right)), max(int(upper) + 1, round(lower)))
                return resized(pixels, whole, side)
        picture = self._cache.picture(sample)
        box = crop_box(picture.size, numbers, self.crop)
        return np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC, box=box))

    def _tokens(self, sample: Sample) -> list[int]:
        if self.captions is not None:
            caption = self.captions[sample["__index__"]]
        else:
            caption = sample["txt"].decode("utf-8", "replace")
        ids = self._ids.get(caption)
        if ids is None:
            ids = self.tokenizer.encode(caption, self.context)
            if len(self._ids) < TOKENIZED_TEXTS:
                self._ids[caption] = ids
        return ids


def together(samples: Sequence[Sample]) -> dict[str, Any]:
    """Put prepared samples into columns: `images` uint8 `[B, H, W, 3]`, `draws` `[B, DRAWS]` and more, and lists.

    In a loader's process the pictures are put into shared memory at once, which saves a copy on their way out.
    """
    first = samples[0]["crop"]
    images = (
        _shared((len(samples), *first.shape))
        if get_worker_info()
        else torch.empty((len(samples), *first.shape), dtype=torch.uint8)
    )
    out = images.numpy()
    for place, sample in enumerate(samples):
        out[place] = sample["crop"]
    return {
        "images": images,
        "draws": torch.from_numpy(np.stack([sample["draws"] for sample in samples])),
        "ids": [sample["ids"] for sample in samples],
        "keys": [sample["__key__"] for sample in samples],
        "skipped": [sample["__hole__"] for sample in samples if "__hole__" in sample],
    }


def _shared(shape: tuple[int, ...]) -> Tensor:
    storage = torch.UntypedStorage._new_shared(int(np.prod(shape)))
    return torch.tensor([], dtype=torch.uint8).set_(storage).view(shape)
