"""What is known of each sample for telling duplicates: one small parquet file for each raw shard."""

from __future__ import annotations

import hashlib
import io
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from dedup.sidecars import columns_of
from infra.errors import RunError, UserError
from infra.logs import log
from infra.storage import Folder
from shards.layout import DEDUP, RAW, SIGNATURES, SOURCE_KEY, Status
from shards.pdq import pdq
from shards.sample import FORMATS, UNDECODABLE

HASH_BYTES, CAPTION_BYTES = 32, 16
SOURCE_COLUMN = b"source_column"
"""Key in a file's metadata: the column that `source` is of."""
_SHA256_BYTES = 32
_COLUMNS = [
    "key", "caption", "status", "sha256", "width", "height", "original_width", "original_height",
    "image_offset", "image_bytes",
]  # fmt: skip
_HASH = ["phash", "phash_quality"]

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("sha256", pa.binary(_SHA256_BYTES)),  # of the body
        pa.field("phash", pa.binary(HASH_BYTES)),  # PDQ
        pa.field("phash_quality", pa.int16()),
        pa.field("pixels", pa.int64(), nullable=False),  # of the original picture, width times height
        pa.field("caption_characters", pa.int32(), nullable=False),
        pa.field("caption_digest", pa.binary(CAPTION_BYTES), nullable=False),  # of the normalised caption
        pa.field("source", pa.string()),  # the value of the column that `keep` chooses a source by
        pa.field("image_offset", pa.int64(), nullable=False),  # of the image's bytes in the raw tar
        pa.field("image_bytes", pa.int64(), nullable=False),
    ]
)


class SignatureWriter:
    """Makes the signatures of raw shards; a Ray actor holds one."""

    def __init__(self, corpus: str, source_column: str | None = None, stage: str = RAW) -> None:
        """Make those of `raw/`; those of another stage's shards can be had (`made`), but have no place."""
        folder = Folder(corpus)
        self.raw, self.out, self.source_column = folder / stage, folder / DEDUP / SIGNATURES, source_column

    def run(self, shard: str) -> int:
        """Write the signatures of one shard's samples, atomically; return how many there are.

        Raises:
            UserError, RunError: as `made`.
        """
        table, buffer = self.made(shard), io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        self.out.write(f"{shard}.parquet", buffer.getvalue())
        return int(table.num_rows)

    def made(self, shard: str) -> pa.Table:
        """Return the signatures of one shard's samples, by their keys in `raw/`.

        Pictures that the sidecar has no PDQ hash of are read and hashed.

        Raises:
            UserError: the sidecar does not have the column of the sources.
            RunError: the sidecar is damaged, or a picture cannot be decoded.
        """
        wanted = [*_COLUMNS, SOURCE_KEY, *_HASH, *([self.source_column] if self.source_column else [])]
        sidecar = columns_of(self.raw, shard, wanted)
        if self.source_column is not None and self.source_column not in sidecar.column_names:
            raise UserError(
                f"source_column: {self.raw.path(shard)}.parquet has no column '{self.source_column}'; name one that "
                "`plan` passed through"
            )
        try:
            table = signatures(sidecar, self.source_column)
        except ValueError as error:
            raise RunError(
                f"{self.raw.path(shard)}.parquet: a hash is damaged ({error}); see `pairmill verify`"
            ) from None
        table = self._hashed(shard, table)
        return table if self.source_column is None else _of_source(table, self.source_column)

    def _hashed(self, shard: str, table: pa.Table) -> pa.Table:
        """Return signatures in which no sample lacks a PDQ hash."""
        lacking = pc.is_null(table["phash"]).to_numpy()
        if not lacking.any():
            return table
        phash, quality = (table[name].to_pylist() for name in _HASH)
        offsets, sizes = table["image_offset"].to_numpy(), table["image_bytes"].to_numpy()
        with self.raw.open(f"{shard}.tar") as tar:
            for row in np.flatnonzero(lacking).tolist():
                tar.seek(int(offsets[row]))
                try:
                    digits, quality[row] = _pdq_of(tar.read(int(sizes[row])))
                except UNDECODABLE as error:
                    raise RunError(
                        f"{self.raw.path(shard)}.tar: the image of {table['key'][row]} cannot be decoded ({error}); "
                        "see what else is wrong with `pairmill verify`"
                    ) from None
                phash[row] = bytes.fromhex(digits)
        for name, values in zip(_HASH, (phash, quality), strict=True):
            place = SCHEMA.get_field_index(name)
            table = table.set_column(place, SCHEMA.field(name), pa.array(values, SCHEMA.field(name).type))
        return table


def _of_source(table: pa.Table, column: str) -> pa.Table:
    return table.replace_schema_metadata({SOURCE_COLUMN: column.encode()})


def _is_usable(table: pa.Table, source_column: str | None) -> bool:
    """Tell whether signatures are of this version, and of these sources where any are asked for."""
    has = (table.schema.metadata or {}).get(SOURCE_COLUMN)
    return bool(table.schema == SCHEMA) and (source_column is None or has == source_column.encode())


def _pdq_of(data: bytes) -> tuple[str, int]:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return pdq(image.convert("RGB"))


def signatures(sidecar: pa.Table, source_column: str | None = None) -> pa.Table:
    """Return the signatures of a sidecar's samples (rows of status `success`), in its order."""
    rows = sidecar.filter(pc.equal(sidecar["status"], Status.SUCCESS.value))
    width = pc.cast(pc.coalesce(rows["original_width"], rows["width"], pa.scalar(0, pa.int32())), pa.int64())
    height = pc.cast(pc.coalesce(rows["original_height"], rows["height"], pa.scalar(0, pa.int32())), pa.int64())
    has_hash = "phash" in rows.column_names
    columns: dict[str, Any] = {
        "key": rows[SOURCE_KEY] if SOURCE_KEY in rows.column_names else rows["key"],
        "sha256": _from_hex(rows["sha256"], _SHA256_BYTES),
        "phash": _from_hex(rows["phash"], HASH_BYTES) if has_hash else pa.nulls(len(rows), pa.binary(HASH_BYTES)),
        "phash_quality": rows["phash_quality"] if has_hash else pa.nulls(len(rows), pa.int16()),
        "pixels": pc.multiply(width, height),
        "caption_characters": pc.utf8_length(rows["caption"]),
        "caption_digest": pa.array(
            [caption_digest(caption or "") for caption in rows["caption"].to_pylist()], pa.binary(CAPTION_BYTES)
        ),
        "source": pc.cast(rows[source_column], pa.string()) if source_column else pa.nulls(len(rows), pa.string()),
        "image_offset": rows["image_offset"],
        "image_bytes": rows["image_bytes"],
    }
    return pa.table(columns, schema=SCHEMA)


def caption_digest(caption: str) -> bytes:
    """Return what is equal for captions that differ in case, spaces or the forms of their characters alone."""
    words = unicodedata.normalize("NFKC", caption).casefold().split()
    return hashlib.sha256(" ".join(words).encode(errors="surrogatepass")).digest()[:CAPTION_BYTES]


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
    caption_digest: npt.NDArray[np.uint64]  # [N, 2]
    source: npt.NDArray[np.str_]  # [N], empty without one
    image_offset: npt.NDArray[np.int64]  # [N]
    image_bytes: npt.NDArray[np.int64]  # [N]

    def __len__(self) -> int:
        return len(self.keys)


def load(corpus: str, shards: Sequence[str], source_column: str | None = None) -> Signatures:
    """Read the signatures of `shards` (all must have been written)."""
    return of_tables(shards, [_of_shard(corpus, shard, source_column) for shard in shards])


def of_tables(shards: Sequence[str], tables: Sequence[pa.Table]) -> Signatures:
    """Return the signatures that are in `tables`, one for each of `shards`."""
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
        caption_digest=_fixed(table["caption_digest"], CAPTION_BYTES).view(np.uint64).reshape(-1, 2)[order],
        source=np.asarray(table["source"].fill_null("").to_pylist(), dtype=np.str_)[order],
        image_offset=table["image_offset"].to_numpy()[order],
        image_bytes=table["image_bytes"].to_numpy()[order],
    )


def drop_signatures(corpus: Folder, shard: str, keys: Sequence[str]) -> None:
    """Leave the samples of these keys out of a shard's signatures; the others stay as they are."""
    folder, name = corpus / DEDUP / SIGNATURES, f"{shard}.parquet"
    table = pq.read_table(io.BytesIO(folder.read(name)))
    buffer = io.BytesIO()
    gone = pc.is_in(table["key"], pa.array(keys, pa.string()))
    pq.write_table(table.filter(pc.invert(gone)), buffer, compression="zstd")
    folder.write(name, buffer.getvalue())


def _of_shard(corpus: str, shard: str, source_column: str | None) -> pa.Table:
    folder, name = Folder(corpus) / DEDUP / SIGNATURES, f"{shard}.parquet"
    try:
        table = pq.read_table(io.BytesIO(folder.read(name)))
    except pa.ArrowInvalid as error:
        log.warning("%s: damaged (%s); making it again", folder.path(name), " ".join(str(error).split()))
        table = None
    if table is None or not _is_usable(table, source_column):
        SignatureWriter(corpus, source_column).run(shard)
        table = pq.read_table(io.BytesIO(folder.read(name)))
    return table


def _fixed(column: pa.ChunkedArray, size: int) -> npt.NDArray[np.void]:
    """Return a column of fixed-size bytes as `[N]` records of `size` bytes, zeros where it is null."""
    whole = column.combine_chunks().fill_null(bytes(size))
    data = whole.buffers()[1]
    if data is None or not len(whole):
        return np.empty(0, dtype=f"V{size}")
    return np.frombuffer(data, dtype=f"V{size}", count=len(whole), offset=whole.offset * size)
