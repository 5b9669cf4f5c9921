"""Thumbnails of a corpus' samples, for the second look: here where they are few, on Ray where many."""

from __future__ import annotations

import numpy as np

from dedup.choose import Indices
from dedup.confirm import Thumbnailer
from dedup.same_look import THUMBNAIL_PX, Thumbnails
from dedup.signature import Signatures
from dedup.spread import here, on_ray
from infra.cluster import ClusterConfig
from infra.logs import progress
from infra.storage import Folder
from shards.layout import RAW

FEW_PICTURES = 5_000
"""Up to so many, this process does the work itself: sooner done than a worker is started."""


def thumbnails(
    folder: Folder, signatures: Signatures, samples: Indices, cluster: ClusterConfig, stage: str = RAW
) -> Thumbnails:
    """Return the thumbnails `[n, 64, 64, 3]` of `samples` `[n]`, which are in order, from the shards of a stage.

    Raises:
        RunError: a picture cannot be decoded.
    """
    found = np.empty((len(samples), THUMBNAIL_PX, THUMBNAIL_PX, 3), np.uint8)
    rows = {
        shard: np.flatnonzero(signatures.shard[samples] == number) for number, shard in enumerate(signatures.shards)
    }
    tasks = [(shard, _places(signatures, samples[at])) for shard, at in rows.items() if len(at)]
    if len(samples) <= FEW_PICTURES:
        done = here(Thumbnailer(folder.url, stage), tasks)
    else:
        done = on_ray(Thumbnailer, (folder.url, stage), tasks, cluster)
    with progress("dedup: looking again", len(samples), "pictures") as meter:
        for (shard, places), pixels in done:
            found[rows[shard]] = pixels
            meter.advance(len(places))
    return found


def _places(signatures: Signatures, samples: Indices) -> tuple[tuple[int, int], ...]:
    offsets, sizes = signatures.image_offset[samples], signatures.image_bytes[samples]
    return tuple(zip(offsets.tolist(), sizes.tolist(), strict=True))
