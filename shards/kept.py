"""Which samples of a folder a stream takes: a keep list, one bit a sample, with ranks and places by arithmetic."""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import IO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.errors import UserError
from infra.storage import Folder
from shards.index import Index
from shards.keys import keys_in
from shards.layout import KEY_ROW_DIGITS, MAX_ROWS_PER_SHARD, STATS_SUFFIX, by_number

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
_BITS = 512
"""Samples to a row of the bit map."""
NAMED = 3
"""Keys of a list that are not in the folder are named up to so many."""
_KEYS_AT_ONCE = 1 << 16
_EMPTY = "the keep list holds nothing; name a sample at least"
_ADDRESS = rf"^([0-9]{{5}}|[1-9][0-9]{{5,12}})[0-9]{{{KEY_ROW_DIGITS}}}$"
"""A key of this format: a shard's name, then the row."""


class KeepList:
    """A part of a folder's samples, in the folder's order: 13 MB for 100 million, however many are kept."""

    def __init__(self, numbers: Iterable[int] | Ints, samples: int) -> None:
        """Keep the samples of these `numbers`, of `samples` in the folder.

        Raises:
            UserError: no number, or one that is not in the folder.
        """
        numbers = np.unique(np.fromiter(numbers, np.int64) if not isinstance(numbers, np.ndarray) else numbers)
        if not len(numbers):
            raise UserError(_EMPTY)
        if numbers[0] < 0 or numbers[-1] >= samples:
            raise UserError(f"keep list: sample {numbers[-1 if numbers[0] >= 0 else 0]} of {samples}")
        is_kept = np.zeros(samples, dtype=bool)
        is_kept[numbers] = True
        self._keep(is_kept)

    @classmethod
    def of(cls, is_kept: Mask) -> KeepList:
        """Return the list that keeps the samples where `is_kept`, `[samples]`, says so. Raises UserError for none."""
        if not is_kept.any():
            raise UserError(_EMPTY)
        found = cls.__new__(cls)
        found._keep(is_kept)
        return found

    def _keep(self, is_kept: Mask) -> None:
        self.samples = len(is_kept)
        rows = np.pad(is_kept, (0, -len(is_kept) % _BITS)).reshape(-1, _BITS)
        self._rows = np.packbits(rows, axis=1)
        self._before = np.concatenate([[0], np.cumsum(rows.sum(1))])

    def __len__(self) -> int:
        return int(self._before[-1])

    @functools.cached_property
    def digest(self) -> int:
        """A whole number that names the list."""
        return int.from_bytes(hashlib.blake2b(self._rows.tobytes(), digest_size=7).digest(), "little")

    def select(self, places: Ints) -> Ints:
        """Return the number in the folder of the kept samples at `places` among the kept ones."""
        row = np.searchsorted(self._before, places, side="right") - 1
        wanted = places - self._before[row]
        counts = np.cumsum(np.unpackbits(self._rows[row], axis=-1), axis=-1, dtype=np.int16)
        return row * _BITS + (counts <= wanted[..., None]).sum(-1)

    def place(self, number: int) -> int:
        """Return how many kept samples come before a number of the folder."""
        row, bit = divmod(number, _BITS)
        return int(self._before[row]) + int(np.unpackbits(self._rows[row])[:bit].sum())

    def between(self, first: int, stop: int) -> Ints:
        """Return the numbers of the kept samples in `[first, stop)`."""
        row = first // _BITS
        bits = np.unpackbits(self._rows[row : -(-stop // _BITS)])
        found = np.flatnonzero(bits) + row * _BITS
        return found[(found >= first) & (found < stop)]


def of_folder(keep: KeepList | str | os.PathLike[str] | None, folder: Folder, index: Index) -> KeepList | None:
    """Return the keep list of a folder, loaded where a file is named; None where all samples are kept.

    Raises:
        UserError: as `load`, or a list of a folder of another size.
    """
    if keep is not None and not isinstance(keep, KeepList):
        return load(keep, folder, index)
    if keep is not None and keep.samples != index.samples:
        raise UserError(
            f"{folder.url}: the keep list is of a folder of {keep.samples} samples, here are "
            f"{index.samples}; give this folder's own"
        )
    return keep


def load(where: str | os.PathLike[str], folder: Folder, index: Index) -> KeepList:
    """Read a keep list: keys, one a line, or a parquet file's column `key`; any fsspec URL.

    In a folder whose samples share keys, all that have a key of the list are kept. Where keys are no addresses (in
    `raw/`, and in foreign folders), the list's keys are held in memory meanwhile.

    Raises:
        UserError: no such file, no column `key`, or a key that is not in the folder.
    """
    url = os.fspath(where)
    parent, slash, name = url.rpartition("/")
    try:
        with Folder(parent or slash or ".").open(name) as stream:
            batches = _of_table(stream) if PurePosixPath(url).suffix == ".parquet" else _of_lines(stream)
            found = _Found(url, folder, index)
            (found.by_address if _has_no_gaps(folder, index) else found.by_search)(batches)
    except FileNotFoundError:
        raise UserError(f"{url}: no such keep list") from None
    except IsADirectoryError:
        raise UserError(f"{url}: a folder, no keep list; name a file of keys, one a line, or a parquet file") from None
    except (pa.ArrowException, KeyError) as error:
        raise UserError(f"{url}: no keep list ({' '.join(str(error).split())}); give a column 'key'") from None
    return found.keep_list()


def _of_table(stream: IO[bytes]) -> Iterator[pa.Array]:
    for batch in pq.ParquetFile(stream).iter_batches(_KEYS_AT_ONCE, columns=["key"]):
        yield batch.column("key").cast(pa.string())


def _of_lines(stream: IO[bytes]) -> Iterator[pa.Array]:
    lines = (line.rstrip("\n") for line in io.TextIOWrapper(stream, "utf-8-sig", "replace"))
    keys = (line for line in lines if line.strip())
    while batch := list(itertools.islice(keys, _KEYS_AT_ONCE)):
        yield pa.array(batch, pa.string())


class _Found:
    """The samples of a folder that have a key of a list."""

    def __init__(self, where: str, folder: Folder, index: Index) -> None:
        self.where, self.folder, self.index = where, folder, index
        self._is_kept = np.zeros(index.samples, dtype=bool)
        self._missing: list[str | None] = []
        self._missing_count = 0

    def by_address(self, batches: Iterator[pa.Array]) -> None:
        """Keep the samples that the keys are addresses of."""
        shards = [shard for shard in self.index.shards if not by_number(shard.name)[0]]
        number = np.array([int(shard.name) for shard in shards], dtype=np.int64)
        samples = np.array([shard.samples for shard in shards], dtype=np.int64)
        first = np.array([shard.first_sample for shard in shards], dtype=np.int64)
        by_name = np.argsort(number)
        number, samples, first = number[by_name], samples[by_name], first[by_name]
        for keys in batches:
            has_shape = pc.fill_null(pc.match_substring_regex(keys, _ADDRESS), False)
            address = np.from_dlpack(pc.cast(keys.filter(has_shape), pa.int64()))
            shard, row = address // MAX_ROWS_PER_SHARD, address % MAX_ROWS_PER_SHARD
            place = np.minimum(np.searchsorted(number, shard), len(number) - 1)
            is_there = (number[place] == shard) & (row < samples[place])
            self._is_kept[(first[place] + row)[is_there]] = True
            if not is_there.all() or len(address) < len(keys):
                strange = pa.array(~is_there)
                self._miss(keys.filter(pc.invert(has_shape)))
                self._miss(keys.filter(has_shape).filter(strange))

    def by_search(self, batches: Iterator[pa.Array]) -> None:
        """Keep the samples whose keys, read from the folder, are in the list."""
        is_found: dict[str | None, bool] = {}
        for keys in batches:
            is_found.update(dict.fromkeys(keys.to_pylist(), False))
        for shard in self.index.shards:
            for row, key in enumerate(keys_in(self.folder, shard)):
                if key in is_found:
                    is_found[key] = self._is_kept[shard.first_sample + row] = True
        self._miss(pa.array([key for key, there in is_found.items() if not there], pa.string()))

    def keep_list(self) -> KeepList:
        """Return what was found. Raises UserError where a key was not, or where there was none."""
        if self._missing_count:
            more = f" and {self._missing_count - NAMED} more" if self._missing_count > NAMED else ""
            raise UserError(f"{self.where}: not in {self.folder.url}: {', '.join(map(repr, self._missing))}{more}")
        return KeepList.of(self._is_kept)

    def _miss(self, keys: pa.Array) -> None:
        self._missing_count += len(keys)
        self._missing += keys[: NAMED - len(self._missing)].to_pylist()


def _has_no_gaps(folder: Folder, index: Index) -> bool:
    """Tell whether keys are addresses: in the shards that repack writes, which say which layout they are of."""
    first = next((shard.name for shard in index.shards if shard.sidecar_bytes is not None), None)
    return first is not None and "layout" in folder.read_json(first + STATS_SUFFIX)
