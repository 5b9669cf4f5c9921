"""What comes of dedup: the table of the samples that go, and the stage's totals."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dedup.choose import Removals
from dedup.config import DedupConfig
from dedup.decontaminate import Overlap
from dedup.embeddings import Embeddings
from dedup.hamming import distances
from dedup.signature import Signatures
from shards.layout import Reason, Status

EXACT, PERCEPTUAL, SEMANTIC, TEXT = "exact", "perceptual", "semantic", "text"
TEST_IMAGE = Reason.TEST_IMAGE.value
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("kept_key", pa.string()),  # null for `test_image`
        pa.field("method", pa.string(), nullable=False),  # `exact`, `perceptual`, `semantic`, `text` or `test_image`
        pa.field("distance", pa.int32(), nullable=False),  # of the two PDQ hashes, in bits
        pa.field("component", pa.int64(), nullable=False),  # the lowest key in it, as a number
        pa.field("cosine", pa.float32()),  # of the two embeddings; null where it did not go by them
        pa.field("test_set", pa.string()),  # the suite as it was named; null but for `test_image`, as the next
        pa.field("test_image", pa.string()),  # the picture's key there
    ]
)


def table(signatures: Signatures, removals: Removals, overlap: Overlap | None = None) -> pa.Table:
    """Return the samples that go, by their keys: duplicates, and those that show a test picture."""
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
        "test_set": pa.nulls(len(gone), pa.string()),
        "test_image": pa.nulls(len(gone), pa.string()),
    }
    duplicates = pa.table(columns, schema=SCHEMA)
    if overlap is None:
        return duplicates
    shown, of_tests = _shown(signatures, overlap)
    order = np.argsort(np.concatenate([gone, shown]))
    return pa.concat_tables([duplicates, of_tests]).take(pa.array(order))


def _shown(signatures: Signatures, overlap: Overlap) -> tuple[npt.NDArray[np.int64], pa.Table]:
    """Return the samples that show a test picture, and their rows."""
    found, suites = overlap.contaminated(signatures), overlap.suites
    keys, pictures = signatures.keys[found.sample].tolist(), found.picture.tolist()
    columns = {
        "key": pa.array(keys, pa.string()),
        "kept_key": pa.nulls(len(keys), pa.string()),
        "method": pa.array([TEST_IMAGE] * len(keys), pa.string()),
        "distance": pa.array(found.distance, pa.int32()),
        "component": pa.array([int(key) for key in keys], pa.int64()),
        "cosine": pa.array(found.cosine, pa.float32(), mask=np.isnan(found.cosine)),
        "test_set": pa.array([suites.names[suites.suite[one]] for one in pictures], pa.string()),
        "test_image": pa.array([suites.pictures[one].key for one in pictures], pa.string()),
    }
    return found.sample, pa.table(columns, schema=SCHEMA)


def totals(
    signatures: Signatures,
    removals: Removals,
    embeddings: Embeddings | None,
    config: DedupConfig,
    overlap: Overlap | None = None,
) -> dict[str, Any]:
    gone, is_semantic = removals.kept >= 0, ~np.isnan(removals.cosine)
    shown = 0 if overlap is None else len(overlap.contaminated(signatures).sample)
    removed, rows = int(gone.sum()) + shown, len(signatures)
    reasons = Counter(
        {
            Reason.DUPLICATE_EXACT.value: int(removals.is_exact[gone].sum()),
            Reason.DUPLICATE_PERCEPTUAL.value: int(
                (gone & ~removals.is_exact & ~is_semantic & ~removals.is_capped).sum()
            ),
            Reason.DUPLICATE_SEMANTIC.value: int(is_semantic.sum()),
            Reason.DUPLICATE_TEXT.value: int(removals.is_capped.sum()),
            Reason.TEST_IMAGE.value: shown,
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
        **({} if overlap is None else {"test_sets": overlap.by_suite()}),
    }
