"""Embeddings of a corpus' samples, read from parquet files with a key and a vector a row."""

from __future__ import annotations

import errno
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import NoSpaceError, UserError
from infra.logs import log
from infra.storage import Folder
from shards.layout import EMBEDDED, SOURCE_KEY

KEY, EMBEDDING = "key", "embedding"
_SUFFIX = ".parquet"
_NORMALISED_AT_ONCE, _READ_AT_ONCE = 65_536, 16_384


@dataclass(frozen=True)
class Embeddings:
    """Unit vectors of `N` samples, zeros for those that have none."""

    vectors: npt.NDArray[np.float16]  # [N, D]
    has: npt.NDArray[np.bool_]  # [N]

    def cosines(self, first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return the cosines of samples `[P]` and samples `[P]`, pair by pair; NaN where one has no embedding."""
        found = np.full(len(first), np.nan, np.float32)
        for at in range(0, len(first), _NORMALISED_AT_ONCE):
            one, other = first[at : at + _NORMALISED_AT_ONCE], second[at : at + _NORMALISED_AT_ONCE]
            products = np.einsum("pd,pd->p", *(self.vectors[side].astype(np.float32) for side in (one, other)))
            found[at : at + len(one)] = np.where(self.has[one] & self.has[other], products, np.nan)
        return found


class Chosen:
    """Some rows of a matrix `[M, D]` as one of their own `[N, D]`, of which nothing is copied until it is asked for."""

    def __init__(self, matrix: npt.NDArray[np.floating], rows: npt.NDArray[np.int64]) -> None:
        """Choose `rows` `[N]`."""
        self._matrix, self._rows = matrix, rows
        self.shape, self.dtype = (len(rows), matrix.shape[1]), matrix.dtype

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: Any, /) -> npt.NDArray[np.floating]:
        """Return an array of some rows."""
        found: npt.NDArray[np.floating] = self._matrix[self._rows[rows]]
        return found


def load(
    path: str,
    keys: npt.NDArray[np.str_],
    what: str = "samples",
    mend: str = "embed this corpus' raw/ or final/",
    scratch: str | None = None,
) -> Embeddings:
    """Read the embeddings of the samples `keys` `[N]` from a parquet file or from all in a folder.

    A file has a column `embedding` (lists of as many numbers each, of any length) and a column `source_key` or else
    `key`, with the sample's raw key. Rows of other keys are passed over. Vectors are brought to length 1.
    `what` they are of, and how to `mend` it where there are none, goes into messages. With `scratch` the vectors lie
    in a nameless file in that folder of this machine, and memory holds what of it is in use.

    Raises:
        UserError: no such file, a column is missing, two dimensions, a vector that is null, zero or not finite, a
            key that comes twice, or none of `keys` there; the message names file and key. No such folder as `scratch`.
        NoSpaceError: no room in `scratch`.
    """
    folder, names = _files(path)
    order = np.argsort(keys)
    by_text = keys[order]
    vectors: npt.NDArray[np.float16] | None = None
    has, first_file = np.zeros(len(keys), bool), names[0]
    for name in names:
        where = folder.path(name)
        for file_keys, part in _parts(folder, name):
            if vectors is None:
                vectors, first_file = _zeros((len(keys), part.shape[1]), scratch), where
            if part.shape[1] != vectors.shape[1]:
                raise UserError(
                    f"{where}: embeddings of {part.shape[1]} numbers, {first_file} has {vectors.shape[1]}; embed all "
                    "samples with one model"
                )
            found = np.minimum(np.searchsorted(by_text, file_keys), max(0, len(keys) - 1))
            known = np.flatnonzero(by_text[found] == file_keys) if len(keys) else np.empty(0, np.int64)
            rows = order[found[known]]
            _check_once(where, file_keys[known], rows, has)
            has[rows] = True
            vectors[rows] = _unit(where, file_keys[known], part[known])
    if vectors is None:  # files without a row
        vectors = np.zeros((len(keys), 0), np.float16)
    _tell_missing(path, has, what, mend)
    return Embeddings(vectors, has)


def _zeros(shape: tuple[int, int], scratch: str | None) -> npt.NDArray[np.float16]:
    if scratch is None or 0 in shape:
        return np.zeros(shape, np.float16)
    size = math.prod(shape) * np.dtype(np.float16).itemsize
    try:
        with tempfile.TemporaryFile(dir=scratch) as file:
            os.posix_fallocate(file.fileno(), 0, size)  # now: a page that finds no room later ends the process
            return np.memmap(file, np.float16, "r+", shape=shape)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise NoSpaceError(f"{scratch}: no room for {size} bytes of embeddings; name another folder") from None
        raise UserError(
            f"semantic.scratch: {scratch}: {error.strerror}; name a folder of this machine that can be written to"
        ) from None


def _files(path: str) -> tuple[Folder, list[str]]:
    if path.endswith(_SUFFIX):
        above, _, name = path.rpartition("/")
        folder, names = Folder(above or ("/" if path.startswith("/") else ".")), [name]
        if not folder.exists(name):
            raise UserError(f"{path}: no such file of embeddings; write them with `pairmill embed`")
        return folder, names
    folder = Folder(path)
    names = folder.names(_SUFFIX)
    if not names:
        raise UserError(f"{path}: no {_SUFFIX} files with embeddings here; write them with `pairmill embed`")
    return folder, names


def check(path: str) -> None:
    """Look whether there are embeddings at `path`, without reading any. Raises UserError as `load`."""
    folder, names = _files(path)
    for name in names:
        with folder.open(name) as stream:
            _opened(folder.path(name), stream)


def _parts(folder: Folder, name: str) -> Iterator[tuple[npt.NDArray[np.str_], npt.NDArray[np.floating]]]:
    """Yield a file's keys `[n]` and embeddings `[n, D]`, some thousands at a time."""
    where = folder.path(name)
    with folder.open(name) as stream:
        file, key = _opened(where, stream)
        batches = file.iter_batches(_READ_AT_ONCE, columns=[key, EMBEDDING])
        for batch in batches:
            table = pa.Table.from_batches([batch])
            if table[key].null_count:
                raise UserError(f"{where}: a row without a key in the column '{key}'; give each embedding its sample's")
            keys = np.asarray(table[key].to_pylist(), dtype=np.str_)
            yield keys, _matrix(where, keys, table[EMBEDDING])


def _opened(where: str, stream: IO[bytes]) -> tuple[pq.ParquetFile, str]:
    """Return a file of embeddings, and which of its columns has the keys."""
    try:
        file = pq.ParquetFile(stream)
    except pa.ArrowInvalid as error:
        raise UserError(f"{where}: no sound parquet file ({error}); remove it and embed again") from None
    schema = file.schema_arrow
    key = SOURCE_KEY if SOURCE_KEY in schema.names else KEY
    for column in (key, EMBEDDING):
        if column not in schema.names:
            raise UserError(f"{where}: no column '{column}'; a file of embeddings has '{KEY}' and '{EMBEDDING}'")
    kind = schema.field(key).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"{where}: the column '{key}' is {kind}; keys are text, as in raw/: '000120034'")
    return file, key


def _matrix(where: str, keys: npt.NDArray[np.str_], column: pa.ChunkedArray) -> npt.NDArray[np.floating]:
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list or not pa.types.is_floating(kind.value_type):
        raise UserError(f"{where}: the column '{EMBEDDING}' is {kind}; it should be lists of floating-point numbers")
    width = kind.list_size if pa.types.is_fixed_size_list(kind) else None
    parts: list[npt.NDArray[np.floating]] = []
    for chunk in column.chunks:
        lengths = np.asarray([-1 if one is None else one for one in chunk.value_lengths().to_pylist()])
        if len(chunk) and width is None:
            width = int(lengths[0])
        wrong = np.flatnonzero((lengths != width) | chunk.is_null().to_numpy(zero_copy_only=False))
        if len(wrong):
            at = sum(len(part) for part in parts) + int(wrong[0])
            raise UserError(f"{where}: the embedding of {keys[at]} is null or not of {width} numbers, as others are")
        parts.append(chunk.flatten().to_numpy(zero_copy_only=False).reshape(len(chunk), width or 0))
    return np.concatenate(parts) if parts else np.empty((0, width or 0), np.float16)


def _check_once(
    where: str, keys: npt.NDArray[np.str_], rows: npt.NDArray[np.int64], has: npt.NDArray[np.bool_]
) -> None:
    values, counts = np.unique(rows, return_counts=True)
    again = np.isin(rows, values[counts > 1]) | has[rows]
    if again.any():
        raise UserError(f"{where}: a second embedding of {keys[again.argmax()]}; keep one of each sample")


def _unit(where: str, keys: npt.NDArray[np.str_], part: npt.NDArray[Any]) -> npt.NDArray[np.float16]:
    wide = part.astype(np.float64)
    length = np.linalg.norm(wide, axis=1, keepdims=True)
    bad = np.flatnonzero(~np.isfinite(length[:, 0]) | (length[:, 0] == 0))
    if len(bad):
        what = "zero" if length[bad[0], 0] == 0 else "not finite (NaN or infinite)"
        raise UserError(f"{where}: the embedding of {keys[bad[0]]} is {what}; leave that row out or embed it again")
    return (wide / length).astype(np.float16)


def _tell_missing(path: str, has: npt.NDArray[np.bool_], what: str, mend: str) -> None:
    missing = int((~has).sum())
    if missing and missing == len(has):
        raise UserError(f"{path}: holds no embedding of any of the {missing} {what}; {mend}")
    if missing:
        log.warning("%s: %d of %d %s have no embedding here; they join nothing by it", path, missing, len(has), what)


def check_one_model(path: str, other: str) -> None:
    """Raise UserError if `embeddings.json` beside both says that two models made them; without it nothing is known."""
    models = [_model_of(one) for one in (path, other)]
    if None not in models and models[0] != models[1]:
        raise UserError(
            f"{other}: embeddings by the model {models[1]}, those at {path} are by {models[0]}; embed both with one"
        )


def _model_of(path: str) -> str | None:
    folder, _ = _files(path)
    record = folder.read_json(EMBEDDED) if folder.exists(EMBEDDED) else None
    found = record.get("weights_sha256") if isinstance(record, dict) else None
    return None if found is None else str(found)
