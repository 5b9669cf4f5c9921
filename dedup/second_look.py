"""The second look at all samples of equal or near hashes: batch by batch, here where they are few, on Ray where many.

The driver holds no thumbnail but those of the one batch that it works on itself. A worker holds those of a batch, and
of a component that is larger than a batch no more than `pictures.HELD`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dedup.batches import Batch, Batches
from dedup.choose import Settled
from dedup.config import DedupConfig
from dedup.links import settled
from dedup.pictures import Bounds, Pictures, Places
from dedup.signature import Signatures
from dedup.spread import here, on_ray
from infra.cluster import ClusterConfig
from infra.logs import progress
from infra.storage import Folder
from shards.layout import RAW

BATCH_SAMPLES = 4096
"""Samples of a batch: 50 MB of thumbnails, some seconds of work."""
FEW_SAMPLES = 5_000
"""Up to so many, this process does the work itself: sooner done than a worker is started."""


@dataclass(frozen=True)
class _Task:
    batch: Batch
    places: Places

    def __str__(self) -> str:
        return str(self.batch)


class _Tasks:
    """A task for each batch, made when it is asked for."""

    def __init__(self, batches: Batches, signatures: Signatures) -> None:
        self._batches, self._of = batches, signatures

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[_Task]:
        for batch in self._batches:
            yield _Task(batch, Places.of(self._of, batch.samples))


class SecondLook:
    """Decides of one batch after the other; a Ray actor holds one."""

    def __init__(self, corpus: str, shards: tuple[str, ...], bounds: Bounds) -> None:
        """Read pictures from the raw `shards`."""
        self._raw, self._shards, self._bounds = Folder(corpus) / RAW, shards, bounds

    def run(self, task: _Task) -> Settled:
        """Return who goes for whom.

        Raises:
            RunError: a picture cannot be read or decoded.
        """
        pictures = Pictures(self._raw, self._shards, task.places, self._bounds)
        pictures.hold_all()
        return settled(task.batch, pictures.same)


def look_again(
    folder: Folder, signatures: Signatures, batches: Batches, config: DedupConfig, cluster: ClusterConfig
) -> Iterator[Settled]:
    """Yield who goes for whom in each of `batches`, as they come.

    Raises:
        RunError: a picture cannot be read or decoded.
    """
    arguments = (folder.url, signatures.shards, Bounds.of(config))
    tasks = _Tasks(batches, signatures)
    if batches.samples <= FEW_SAMPLES:
        done = here(SecondLook(*arguments), tasks)
    else:
        done = on_ray(SecondLook, arguments, tasks, cluster)
    with progress("dedup: looking again", batches.samples, "pictures") as meter:
        for _, part in done:
            meter.advance(len(part.samples))
            yield part
