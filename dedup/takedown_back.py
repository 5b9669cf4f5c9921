"""What becomes of other pictures once the one they went for is taken down: who comes back, and who is their copy."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dedup.batches import Batches
from dedup.choose import NOBODY, Indices, by_hash, choose, rank
from dedup.config import DedupConfig
from dedup.exact import same_body
from dedup.hamming import all_pairs
from dedup.links import settled
from dedup.outcome import EXACT, PERCEPTUAL, SEMANTIC, TEXT
from dedup.signature import SCHEMA, Signatures, of_tables, signatures
from dedup.takedown_match import raw_shards_of
from infra.storage import Folder
from shards.layout import DEDUP, SIGNATURES
from shards.manifest import Manifest
from shards.selection import sidecar

_OPTIONS = ("perceptual", "distance", "min_quality", "keep", "source_column", "sources")


class Goes(NamedTuple):
    """Whom a sample goes for from now on, by which method, and how far that is in bits; None: as it was."""

    kept_key: str
    method: str
    distance: int | None


@dataclass(frozen=True)
class Outlook:
    """Other pictures that lose the one they went for.

    Attributes:
        lost: the one they went for and the method, by key.
        goes: of those, who goes for another of them from now on.
    """

    lost: Mapping[str, tuple[str, str]]
    goes: Mapping[str, Goes]

    @property
    def back(self) -> list[str]:
        """The keys of those who come back."""
        return [key for key in self.lost if key not in self.goes]


def outlook(corpus: Folder, lost: Mapping[str, tuple[str, str]]) -> Outlook:
    """Return what becomes of those that are `bereft` (see `dedup.takedown_aside`), which follows from them alone.

    Of a kept key's captions the one of the lowest key comes back, in the place of the one that goes. Of those that went
    by their embeddings all do but for copies of one another: they had followed the same picture together.
    """
    return Outlook(lost, _by_captions(lost) | _copies(corpus, lost))


def _by_captions(lost: Mapping[str, tuple[str, str]]) -> dict[str, Goes]:
    keys = sorted((key for key, (_, method) in lost.items() if method == TEXT), key=int, reverse=True)
    heirs = {lost[key][0]: key for key in keys}
    return {key: Goes(heirs[lost[key][0]], TEXT, None) for key in keys if heirs[lost[key][0]] != key}


def _copies(corpus: Folder, lost: Mapping[str, tuple[str, str]]) -> dict[str, Goes]:
    """Return who goes for a better one of the same body, or of a near hash where both went for the same picture.

    As dedup chooses, but without the second look: two that it told apart were still near to one picture.
    """
    went_for = {key: kept for key, (kept, method) in lost.items() if method == SEMANTIC}
    if len(went_for) < 2:
        return {}
    told = _signatures_of(corpus, went_for)
    recorded = Manifest.existing(corpus).config(DEDUP)
    config = DedupConfig.model_validate({name: recorded[name] for name in _OPTIONS if name in recorded})
    place, everyone = rank(told, config), np.arange(len(told))
    leader = same_body(told, place)
    hashed = config.perceptual & (leader == everyone) & (told.quality >= config.min_quality)
    groups = by_hash(told.phash, np.flatnonzero(hashed), place)
    batches = Batches(groups, all_pairs(groups.hashes, config.distance), place, None, len(told))
    of = np.array([went_for[key] for key in told.keys.tolist()])

    def together(samples: Indices, first: Indices, second: Indices) -> npt.NDArray[np.bool_]:
        return np.asarray(of[samples[first]] == of[samples[second]])

    parts = (settled(one, lambda *pair, samples=one.samples: together(samples, *pair)) for one in batches)
    removals = choose(leader, parts)
    return {
        str(told.keys[sample]): Goes(
            str(told.keys[removals.kept[sample]]),
            EXACT if removals.is_exact[sample] else PERCEPTUAL,
            int(removals.distance[sample]),
        )
        for sample in np.flatnonzero(removals.kept != NOBODY).tolist()
    }


def _signatures_of(corpus: Folder, keys: Collection[str]) -> Signatures:
    """Return the signatures of these samples, without those of which there is nothing to compare any more."""
    shards = [shard for _, shard in raw_shards_of(corpus, keys)]
    wanted = pa.array(keys, pa.string())
    tables = (_signatures_in(corpus, shard) for shard in shards)
    return of_tables(shards, [table.filter(pc.is_in(table["key"], wanted)) for table in tables])


def _signatures_in(corpus: Folder, shard: str) -> pa.Table:
    folder, name = corpus / DEDUP / SIGNATURES, f"{shard}.parquet"
    table = pq.read_table(io.BytesIO(folder.read(name))) if folder.exists(name) else None
    if table is None or table.schema != SCHEMA:  # of an earlier version
        table = signatures(sidecar(corpus, shard))
    return table.replace_schema_metadata(None)
