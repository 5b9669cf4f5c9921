"""Pairs at the thresholds and just beyond them, for a person who is to choose them by looking: `thresholds.parquet`.

Beyond a threshold nobody knows the pairs, and all of them would cost more than the stage. So some samples are drawn and
compared with all, which grows with the corpus alone. A hash takes 2.6 microseconds: 400 million 20 minutes of one core,
where all pairs within take hours (`benchmarks/threshold_sheet.py`). An embedding takes a product with each drawn one,
2,000 by default; clusters of the same 400 million need 160,000 each.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from dedup.choose import HashGroups, Indices, SameLook
from dedup.config import DedupConfig, SemanticConfig
from dedup.embeddings import Embeddings
from dedup.hamming import distances
from dedup.hamming_between import pairs_between
from dedup.outcome import PERCEPTUAL, SEMANTIC
from dedup.signature import Signatures
from dedup.threshold_draw import NONE, STEPS, Draw, Drawn
from infra.cluster import ClusterConfig
from infra.errors import RunError
from infra.logs import log
from infra.storage import Folder
from shards.layout import THRESHOLDS

WITHIN, BEYOND = "within", "beyond"
BITS, COSINE = 8, 0.02
"""How far a pair may lie from the threshold, on either side."""
PAIRS = 32
"""Pairs of each method and side."""
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("other_key", pa.string(), nullable=False),
        pa.field("method", pa.string(), nullable=False),  # `perceptual` or `semantic`
        pa.field("side", pa.string(), nullable=False),  # `within` the threshold or `beyond` it
        pa.field("distance", pa.int32()),  # of the two PDQ hashes, in bits; null for `semantic`
        pa.field("cosine", pa.float32()),  # of the two embeddings; null for `perceptual`
        pa.field("same", pa.bool_()),  # whether the second look took them for one picture; null without one
    ]
)
_HASHES_AT_ONCE = 1 << 20
_COSINES_AT_ONCE = 1 << 22
_BY_KEY = [("key", "ascending"), ("other_key", "ascending")]

Look = Callable[[Indices], SameLook]
"""Looks at the pictures of samples `[n]`, and returns the comparison of any two of them."""


class Sheet:
    """Takes pairs while the stage has their hashes and embeddings at hand, and writes them at its end."""

    def __init__(self, config: DedupConfig, cluster: ClusterConfig) -> None:
        self._config, self._cluster = config, cluster
        self._near = self._close = NONE

    def look_at_hashes(self, groups: HashGroups) -> None:
        """Draw pairs by their hashes."""
        if self._config.sheet:
            self._near = at_distance(groups, self._config, self._cluster)

    def look_at_embeddings(self, embeddings: Embeddings, samples: Indices) -> None:
        """Draw pairs of `samples` by their embeddings."""
        if self._config.sheet:
            self._close = at_cosine(embeddings, samples, self._config)

    def write(
        self, folder: Folder, signatures: Signatures, embeddings: Embeddings | None, look: Look | None = None
    ) -> None:
        """Write the pairs into dedup's `folder`; `look` makes the second look for some samples."""
        if not self._config.sheet:
            folder.delete(THRESHOLDS)
            return
        tables = [_by_hash(signatures, self._near, self._same(look))]
        if embeddings is not None:
            tables.append(_by_embedding(signatures, embeddings, self._close, self._config.semantic.threshold))
        buffer = io.BytesIO()
        pq.write_table(pa.concat_tables(tables), buffer, compression="zstd")
        folder.write(THRESHOLDS, buffer.getvalue())

    def _same(self, look: Look | None) -> list[bool] | None:
        """Return what the second look says of the near pairs; None where there is none, or a picture is damaged."""
        first, second, _ = self._near
        if look is None or not len(first):
            return None
        try:
            same: list[bool] = look(np.unique(np.concatenate([first, second])))(first, second).tolist()
        except RunError as error:
            log.warning("dedup: %s; the pairs at the threshold have no second look", error)
            return None
        return same


def at_distance(groups: HashGroups, config: DedupConfig, cluster: ClusterConfig) -> Drawn:
    """Draw pairs of samples whose hashes lie up to 8 bits within `config.distance`, or beyond it.

    The groups are in the order of their hashes, so who is drawn does not depend on keys or shards. Memory: the pairs of
    the drawn samples with a million hashes at a time.
    """
    some = _some(len(groups.hashes), config)
    draw = Draw(len(some), config.semantic.seed)
    best = groups.samples[groups.ends[:-1]]
    nearest = max(1, config.distance - BITS + 1)
    for at in range(0, len(groups.hashes), _HASHES_AT_ONCE):
        row, other, bits = pairs_between(
            groups.hashes[some],
            groups.hashes[at : at + _HASHES_AT_ONCE],
            config.distance + BITS,
            threads=cluster.cpus or os.cpu_count() or 1,
        ).T
        near = bits >= nearest  # a hash is 0 bits from itself
        row, other, bits = row[near], other[near] + at, bits[near]
        draw.add(row, bits - (config.distance - BITS + 1), best[some[row]], best[other])
    if config.distance < BITS:
        several = np.flatnonzero(np.diff(groups.ends)[some] > 1)
        step = np.full(len(several), BITS - 1 - config.distance)
        draw.add(several, step, best[some[several]], groups.samples[groups.ends[some[several]] + 1])
    return draw.pairs(PAIRS)


def at_cosine(embeddings: Embeddings, samples: Indices, config: DedupConfig) -> Drawn:
    """Draw pairs of `samples` whose embeddings lie up to 0.02 within the threshold of their cosine, or beyond it.

    Memory: at most four million cosines at a time, and a pair for each of them at worst.
    """
    samples = samples[embeddings.has[samples]]
    some = samples[_some(len(samples), config)]
    draw, semantic = Draw(len(some), config.semantic.seed), config.semantic
    columns = embeddings.vectors[some].astype(np.float32).T
    together = max(1, min(semantic.block, _COSINES_AT_ONCE // max(1, len(some))))
    for at in range(0, len(samples), together):
        rows = samples[at : at + together]
        cosines = (embeddings.vectors[rows].astype(np.float32) @ columns).ravel()
        hits = np.flatnonzero((cosines >= semantic.threshold - COSINE) & (cosines < semantic.threshold + COSINE))
        row, column = np.divmod(hits, len(some))
        other = rows[row] != some[column]
        row, column, hits = row[other], column[other], hits[other]
        draw.add(column, _steps(cosines[hits], semantic), some[column], rows[row])
    return draw.pairs(PAIRS)


def _some(count: int, config: DedupConfig) -> Indices:
    draw = np.random.default_rng(config.semantic.seed)
    return np.sort(draw.choice(count, min(count, config.sheet), replace=False))


def _steps(cosines: npt.NDArray[np.float32], config: SemanticConfig) -> npt.NDArray[np.int64]:
    gap = (config.threshold - cosines) * STEPS / COSINE
    inside = np.clip(np.floor(gap).astype(np.int64), -STEPS, -1)
    outside = np.clip(np.ceil(gap).astype(np.int64), 1, STEPS) - 1
    return STEPS + np.where(cosines >= config.threshold, inside, outside)


def _by_hash(signatures: Signatures, near: Drawn, same: list[bool] | None) -> pa.Table:
    bits = distances(signatures.phash[near.first], signatures.phash[near.second])
    more = {"distance": pa.array(bits, pa.int32()), "cosine": pa.nulls(len(bits), pa.float32())}
    looked = pa.nulls(len(bits), pa.bool_()) if same is None else pa.array(same, pa.bool_())
    columns = _who(signatures, near, PERCEPTUAL, near.is_within) | more | {"same": looked}
    return pa.table(columns, schema=SCHEMA).sort_by([("distance", "ascending"), *_BY_KEY])


def _by_embedding(signatures: Signatures, embeddings: Embeddings, close: Drawn, threshold: float) -> pa.Table:
    cosines = np.minimum(embeddings.cosines(close.first, close.second), np.float32(1))
    empty = {"distance": pa.nulls(len(cosines), pa.int32()), "same": pa.nulls(len(cosines), pa.bool_())}
    columns = _who(signatures, close, SEMANTIC, cosines >= threshold) | empty | {"cosine": pa.array(cosines)}
    return pa.table(columns, schema=SCHEMA).sort_by([("cosine", "descending"), *_BY_KEY])


def _who(signatures: Signatures, pairs: Drawn, method: str, is_within: npt.NDArray[np.bool_]) -> dict[str, pa.Array]:
    return {
        "key": pa.array(signatures.keys[pairs.first].tolist(), pa.string()),
        "other_key": pa.array(signatures.keys[pairs.second].tolist(), pa.string()),
        "method": pa.repeat(pa.scalar(method, pa.string()), len(is_within)),
        "side": pa.array(np.where(is_within, WITHIN, BEYOND).tolist(), pa.string()),
    }
