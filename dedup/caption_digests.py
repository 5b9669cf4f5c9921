"""MinHash digests of samples' captions, made where those are read: shard by shard, on Ray where they are many."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dedup.sidecars import columns_of
from dedup.signature import Signatures
from dedup.spread import few_or_on_ray
from dedup.text import PERMUTATIONS, Digests, Indices, digests
from infra.cluster import ClusterConfig
from infra.logs import progress
from infra.storage import Folder
from shards.layout import RAW


@dataclass(frozen=True)
class _Task:
    shard: str
    keys: tuple[str, ...]
    places: Indices  # among those that were asked for

    def __str__(self) -> str:
        return self.shard


class CaptionDigester:
    """Reads the captions of one shard after the other; a Ray actor holds one."""

    def __init__(self, corpus: str) -> None:
        """Read from the raw sidecars of `corpus`."""
        self._raw = Folder(corpus) / RAW

    def run(self, task: _Task) -> Digests:
        """Return the digests of a shard's captions, `[n, 128]`; no caption is an empty one."""
        rows = columns_of(self._raw, task.shard, ("key", "caption"))
        found = dict(zip(rows["key"].to_pylist(), rows["caption"].to_pylist(), strict=True))
        return digests([found[key] or "" for key in task.keys])


def caption_digests(corpus: str, of: Signatures, samples: Indices, cluster: ClusterConfig) -> Digests:
    """Return the digests of the captions of `samples` `[n]`, `[n, 128]`. The captions themselves are nowhere held.

    Raises:
        RunError: a sidecar cannot be read.
    """
    tasks = list(_tasks(of, samples))
    made = np.empty((len(samples), PERMUTATIONS), np.uint16)
    with progress("dedup: captions", len(samples), "captions") as meter:
        for task, part in few_or_on_ray(CaptionDigester, (corpus,), tasks, cluster):
            made[task.places] = part
            meter.advance(len(part))
    return made


def _tasks(of: Signatures, samples: Indices) -> Iterator[_Task]:
    by_shard = np.argsort(of.shard[samples], kind="stable")
    shard = of.shard[samples[by_shard]]
    for places in np.split(by_shard, np.flatnonzero(np.diff(shard)) + 1) if len(samples) else []:
        keys = tuple(of.keys[samples[places]].tolist())
        yield _Task(of.shards[of.shard[samples[places[0]]]], keys, places)
