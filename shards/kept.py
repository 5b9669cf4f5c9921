"""Which samples of a folder a stream takes: a keep list, one bit a sample, with ranks and places by arithmetic."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import UserError
from infra.storage import Folder
from shards.index import Index, Shard
from shards.keys import keys_in
from shards.layout import STATS_SUFFIX, key_address, shard_name

Ints = npt.NDArray[np.int64]
_BITS = 512
"""Samples to a row of the bit map."""
NAMED = 3
"""Keys of a list that are not in the folder are named up to so many."""


class KeepList:
    """A part of a folder's samples, in the folder's order: 13 MB for 100 million, however many are kept."""

    def __init__(self, numbers: Iterable[int] | Ints, samples: int) -> None:
        """Keep the samples of these `numbers`, of `samples` in the folder.

        Raises:
            UserError: no number, or one that is not in the folder.
        """
        numbers = np.unique(np.fromiter(numbers, np.int64) if not isinstance(numbers, np.ndarray) else numbers)
        if not len(numbers):
            raise UserError("the keep list holds nothing; name a sample at least")
        if numbers[0] < 0 or numbers[-1] >= samples:
            raise UserError(f"keep list: sample {numbers[-1 if numbers[0] >= 0 else 0]} of {samples}")
        bits = np.zeros(-(-samples // _BITS) * _BITS, dtype=bool)
        bits[numbers] = True
        rows = bits.reshape(-1, _BITS)
        self._rows = np.packbits(rows, axis=1)
        self._before = np.concatenate([[0], np.cumsum(rows.sum(1))])

    def __len__(self) -> int:
        return int(self._before[-1])

    @property
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


def load(where: str | os.PathLike[str], folder: Folder, index: Index) -> KeepList:
    """Read a keep list: keys, one a line, or a parquet file's column `key`; any fsspec URL.

    Raises:
        UserError: no such file, no column `key`, or a key that is not in the folder.
    """
    url = PurePosixPath(os.fspath(where))
    parent, _, name = os.fspath(where).rpartition("/")
    try:
        data = Folder(parent or ".").read(name)
    except FileNotFoundError:
        raise UserError(f"{where}: no such keep list") from None
    if url.suffix == ".parquet":
        try:
            keys = pq.read_table(io.BytesIO(data), columns=["key"])["key"].to_pylist()
        except (pa.ArrowException, KeyError) as error:
            raise UserError(f"{where}: no keep list ({' '.join(str(error).split())}); give a column 'key'") from None
    else:
        keys = data.decode("utf-8", "replace").split()
    return KeepList(_numbers(keys, os.fspath(where), folder, index), index.samples)


def _numbers(keys: list[str], where: str, folder: Folder, index: Index) -> Ints:
    wanted = dict.fromkeys(keys)
    found: dict[str, int] = {}
    if _has_no_gaps(folder, index):
        places = {shard.name: shard for shard in index.shards}
        for key in wanted:
            shard, row = _address(key, places)
            if shard is not None and row < shard.samples:
                found[key] = shard.first_sample + row
    else:
        for shard in index.shards:
            found |= {key: shard.first_sample + row for row, key in enumerate(keys_in(folder, shard)) if key in wanted}
    missing = [key for key in wanted if key not in found]
    if missing:
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        raise UserError(f"{where}: not in {folder.url}: {', '.join(map(repr, missing[:NAMED]))}{more}")
    return np.array(list(found.values()), dtype=np.int64)


def _address(key: str, places: dict[str, Shard]) -> tuple[Shard | None, int]:
    try:
        number, row = key_address(key)
    except ValueError:
        return None, 0
    return places.get(shard_name(number)), row


def _has_no_gaps(folder: Folder, index: Index) -> bool:
    """Tell whether keys are addresses: in the shards that repack writes, which say which layout they are of."""
    first = next((shard.name for shard in index.shards if shard.sidecar_bytes is not None), None)
    return first is not None and "layout" in folder.read_json(first + STATS_SUFFIX)
