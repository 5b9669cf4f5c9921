"""What is known of each sample for telling duplicates: one small parquet file for each raw shard."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.storage import Folder
from shards.layout import DEDUP, RAW, SIGNATURES, Status

HASH_BYTES = 32
_SHA256_BYTES = 32
_COLUMNS = [
    "key", "caption", "status", "sha256", "phash", "phash_quality", "width", "height",
    "original_width", "original_height", "image_offset", "image_bytes",
]  # fmt: skip

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("sha256", pa.binary(_SHA256_BYTES)),  # of the body
        pa.field("phash", pa.binary(HASH_BYTES)),  # PDQ
        pa.field("phash_quality", pa.int16()),
        pa.field("pixels", pa.int64(), nullable=False),  # of the original picture, width times height
        pa.field("caption_characters", pa.int32(), nullable=False),
        pa.field("image_offset", pa.int64(), nullable=False),  # of the image's bytes in the raw tar
        pa.field("image_bytes", pa.int64(), nullable=False),
    ]
)


class SignatureWriter:
    """Makes the signatures of raw shards; a Ray actor holds one."""

    def __init__(self, corpus: str) -> None:
        folder = Folder(corpus)
        self.raw, self.out = folder / RAW, folder / DEDUP / SIGNATURES

    def run(self, shard: str) -> int:
        """Write the signatures of one shard's samples, atomically; return how many there are."""
        table = signatures(pq.read_table(io.BytesIO(self.raw.read(f"{shard}.parquet")), columns=_COLUMNS))
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        self.out.write(f"{shard}.parquet", buffer.getvalue())
        return int(table.num_rows)


def signatures(sidecar: pa.Table) -> pa.Table:
    """Return the signatures of a sidecar's samples (rows of status `success`), in its order."""
    rows = sidecar.filter(pc.equal(sidecar["status"], Status.SUCCESS.value))
    width = pc.cast(pc.coalesce(rows["original_width"], rows["width"], pa.scalar(0, pa.int32())), pa.int64())
    height = pc.cast(pc.coalesce(rows["original_height"], rows["height"], pa.scalar(0, pa.int32())), pa.int64())
    columns = {
        "key": rows["key"],
        "sha256": _from_hex(rows["sha256"], _SHA256_BYTES),
        "phash": _from_hex(rows["phash"], HASH_BYTES),
        "phash_quality": rows["phash_quality"],
        "pixels": pc.multiply(width, height),
        "caption_characters": pc.utf8_length(rows["caption"]),
        "image_offset": rows["image_offset"],
        "image_bytes": rows["image_bytes"],
    }
    return pa.table(columns, schema=SCHEMA)


def _from_hex(column: pa.ChunkedArray, size: int) -> pa.Array:
    values = (bytes.fromhex(value) if value else None for value in column.to_pylist())
    return pa.array([value if value is not None and len(value) == size else None for value in values], pa.binary(size))


@dataclass(frozen=True)
class Signatures:
    """The signatures of a whole corpus, `N` samples in the order of their keys."""

    keys: npt.NDArray[np.str_]  # [N]
    shard: npt.NDArray[np.int32]  # [N], index into `shards`
    shards: tuple[str, ...]
    sha256: npt.NDArray[np.void]  # [N]
    has_sha256: npt.NDArray[np.bool_]  # [N]
    phash: npt.NDArray[np.uint64]  # [N, 4]
    quality: npt.NDArray[np.int16]  # [N], -1 without a hash
    pixels: npt.NDArray[np.int64]  # [N]
    caption_characters: npt.NDArray[np.int32]  # [N]
    image_offset: npt.NDArray[np.int64]  # [N]
    image_bytes: npt.NDArray[np.int64]  # [N]

    def __len__(self) -> int:
        return len(self.keys)


def load(corpus: str, shards: Sequence[str]) -> Signatures:
    """Read the signatures of `shards` (all must have been written)."""
    folder = Folder(corpus) / DEDUP / SIGNATURES
    tables = [pq.read_table(io.BytesIO(folder.read(f"{shard}.parquet"))) for shard in shards]
    table = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
    shard = np.repeat(np.arange(len(tables), dtype=np.int32), [part.num_rows for part in tables])
    keys = np.asarray(table["key"].to_pylist(), dtype=np.str_)
    order = np.argsort(keys.astype(np.int64), kind="stable")  # as text, shard 100000 would come before 99999
    has_phash = table["phash"].is_valid().to_numpy()
    quality = table["phash_quality"].fill_null(0).to_numpy()
    return Signatures(
        keys=keys[order],
        shard=shard[order],
        shards=tuple(shards),
        sha256=_fixed(table["sha256"], _SHA256_BYTES)[order],
        has_sha256=table["sha256"].is_valid().to_numpy()[order],
        phash=_fixed(table["phash"], HASH_BYTES).view(np.uint64).reshape(-1, 4)[order],
        quality=np.where(has_phash, quality, -1).astype(np.int16)[order],
        pixels=table["pixels"].to_numpy()[order],
        caption_characters=table["caption_characters"].to_numpy()[order],
        image_offset=table["image_offset"].to_numpy()[order],
        image_bytes=table["image_bytes"].to_numpy()[order],
    )


def _fixed(column: pa.ChunkedArray, size: int) -> npt.NDArray[np.void]:
    """Return a column of fixed-size bytes as `[N]` records of `size` bytes, zeros where it is null."""
    whole = column.combine_chunks().fill_null(bytes(size))
    data = whole.buffers()[1]
    if data is None or not len(whole):
        return np.empty(0, dtype=f"V{size}")
    return np.frombuffer(data, dtype=f"V{size}", count=len(whole), offset=whole.offset * size)
