"""Shards of tiny pictures (4 KB a sample) to measure reading on, made by the shard writer. Same numbers, same bytes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from infra.storage import Folder
from shards import index
from shards.layout import SIDECAR, Reason, Status, sample_key, shard_name
from shards.writer import writing

SIDE_PX = 32
PICTURES = 64


def tiny_shards(path: Path, shards: int, samples_a_shard: int, side_px: int = SIDE_PX) -> Folder:
    """Write so many shards and their index into a new folder; 128 px make a sample of 29 KB or so."""
    folder = Folder(path)
    pictures = [_picture(number, side_px) for number in range(PICTURES)]
    for shard in range(shards):
        with writing(folder, shard_name(shard), SIDECAR, {}) as writer:
            for row in range(samples_a_shard):
                told = {
                    "key": sample_key(shard, row), "url": f"https://host.example/{shard}/{row}.jpg",
                    "caption": f"picture {row} of shard {shard}", "status": Status.SUCCESS, "reason": Reason.NONE,
                }  # fmt: skip
                writer.add(dict.fromkeys(SIDECAR.names) | told, pictures[row % PICTURES])
    index.save(folder, index.build(folder))
    return folder


def _picture(number: int, side_px: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (side_px, side_px, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "jpeg")
    return out.getvalue()
