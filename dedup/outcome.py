"""What comes of dedup: the table of the samples that go, and the stage's totals."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa

from dedup.choose import Removals
from dedup.config import DedupConfig
from dedup.embeddings import Embeddings
from dedup.hamming import distances
from dedup.signature import Signatures
from shards.layout import Reason, Status

EXACT, PERCEPTUAL, SEMANTIC, TEXT = "exact", "perceptual", "semantic", "text"
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("kept_key", pa.string(), nullable=False),
        pa.field("method", pa.string(), nullable=False),  # `exact`, `perceptual`, `semantic` or `text`
        pa.field("distance", pa.int32(), nullable=False),  # of the two PDQ hashes, in bits
        pa.field("component", pa.int64(), nullable=False),  # the lowest key in it, as a number
        pa.field("cosine", pa.float32()),  # of the two embeddings; null but for `semantic`
    ]
)


def table(signatures: Signatures, removals: Removals) -> pa.Table:
    gone = np.flatnonzero(removals.kept >= 0)
    kept, cosine = removals.kept[gone], removals.cosine[gone]
    is_semantic = ~np.isnan(cosine)
    bits = distances(signatures.phash[gone], signatures.phash[kept])
    is_capped = removals.is_capped[gone]
    methods = np.select([is_capped, is_semantic, removals.is_exact[gone]], [TEXT, SEMANTIC, EXACT], PERCEPTUAL)
    columns = {
        "key": pa.array(signatures.keys[gone].tolist(), pa.string()),
        "kept_key": pa.array(signatures.keys[kept].tolist(), pa.string()),
        "method": pa.array(methods.tolist(), pa.string()),
        "distance": pa.array(np.where(is_semantic | is_capped, bits, removals.distance[gone]), pa.int32()),
        "component": pa.array([int(key) for key in signatures.keys[removals.component[gone]].tolist()], pa.int64()),
        "cosine": pa.array(np.minimum(cosine, np.float32(1)), pa.float32(), mask=~is_semantic),
    }
    return pa.table(columns, schema=SCHEMA)


def totals(
    signatures: Signatures, removals: Removals, embeddings: Embeddings | None, config: DedupConfig
) -> dict[str, Any]:
    gone, is_semantic = removals.kept >= 0, ~np.isnan(removals.cosine)
    removed, rows = int(gone.sum()), len(signatures)
    reasons = Counter(
        {
            Reason.DUPLICATE_EXACT.value: int(removals.is_exact[gone].sum()),
            Reason.DUPLICATE_PERCEPTUAL.value: int(
                (gone & ~removals.is_exact & ~is_semantic & ~removals.is_capped).sum()
            ),
            Reason.DUPLICATE_SEMANTIC.value: int(is_semantic.sum()),
            Reason.DUPLICATE_TEXT.value: int(removals.is_capped.sum()),
        }
    )
    sizes = np.bincount(removals.component, minlength=1) if rows else np.zeros(1, np.int64)
    statuses = {Status.SUCCESS.value: rows - removed, Status.FILTERED.value: removed}
    unembedded = {} if embeddings is None else {"unembedded": int((~embeddings.has).sum())}
    return {
        "rows_in": rows,
        "kept": rows - removed,
        "removed": removed,
        "by_status": {name: count for name, count in statuses.items() if count},
        "by_reason": {name: count for name, count in sorted(reasons.items()) if count},
        "components": int((sizes > 1).sum()),
        "largest_component": int(sizes.max()),
        "unhashed": int((signatures.quality < config.min_quality).sum()) if config.perceptual else 0,
        **unembedded,
    }
