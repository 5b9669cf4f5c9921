"""Random access: any sample of a folder by number or key, in one ranged read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from infra.storage import Folder
from shards import sample
from shards.index import load_or_scan
from shards.keys import keys_in
from shards.layout import KEY_ROW_DIGITS, RETRY
from shards.reads import PATIENCE_S, Reader


class Samples:
    """A shard folder as a sequence of samples: `samples[7]`, `samples["000120034"]`, `len(samples)`.

    It can be copied and sent to another process; each process, a forked one too, reads with connections of its own.
    """

    def __init__(self, folder: str | Folder, *, decode: bool = False) -> None:
        """Open a folder. Raises UserError where it holds no shards or an index of another version."""
        self.folder = folder if isinstance(folder, Folder) else Folder(folder)
        self.index = load_or_scan(self.folder)
        self._readers: dict[int, Reader] = {}
        self._decode = decode
        self._keys: dict[int, dict[str, int]] = {}
        self._places = {shard.name: place for place, shard in enumerate(self.index.shards)}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_readers": {}}

    def __len__(self) -> int:
        """Samples in the folder."""
        return self.index.samples

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the samples in the folder's order, one read each."""
        return (self[number] for number in range(len(self)))

    def __getitem__(self, which: int | str) -> dict[str, Any]:
        """Return a sample by its number (negative from the end) or its key.

        Raises:
            IndexError, KeyError: there is none.
            BadSampleError: it is damaged, or its shard's sidecar says another key of it.
            UnreadableShardError: its shard cannot be read.
        """
        if isinstance(which, str):
            found = self._by_key(which)
        else:
            number = which + len(self) * (which < 0)
            if not 0 <= number < len(self):
                raise IndexError(f"{self.folder.url}: sample {which} of {len(self)}")
            found = self._read(number)
        if self._decode:
            sample.decode(found)
        return found

    def _reader(self) -> Reader:
        held = self._readers.get(os.getpid())
        if held is None:
            reader = Reader(Folder(self.folder.url), self.index, PATIENCE_S)
            held = self._readers.setdefault(os.getpid(), reader)
        return held

    def _read(self, number: int) -> dict[str, Any]:
        (piece,) = self._reader().read(number, number + 1)
        if piece.fault is not None:
            raise piece.fault
        found = sample.parse(piece.sample(number), ())
        return found | {"__url__": self.folder.path(piece.shard.tar), "__index__": number}

    def _by_key(self, key: str) -> dict[str, Any]:
        name, row = key[:-KEY_ROW_DIGITS], key[-KEY_ROW_DIGITS:]
        place = self._places.get(name)
        # Final shards have no gaps: there the key is the address, and no sidecar is read.
        if place is not None and place not in self._keys and row.isdecimal():
            shard = self.index.shards[place]
            if int(row) < shard.samples:
                found = self._read(shard.first_sample + int(row))
                if found["__key__"] == key:
                    return found
        found = self._read(self.number(key))
        if found["__key__"] != key:
            raise sample.BadSampleError(
                f"{found['__url__']}: where the sidecar has {key!r} lies {found['__key__']!r}; see `pairmill verify`"
            )
        return found

    def number(self, key: str) -> int:
        """Return the number of the sample with this key. Raises KeyError."""
        # A key of this format begins with its shard's name, unless its row was tried again, in a later shard;
        # other folders are searched through.
        likely: list[int] = []
        others: list[int] = []
        for place, shard in enumerate(self.index.shards):
            is_likely = shard.sidecar_bytes is None or key.startswith(shard.name)
            (likely if is_likely else others).append(place)
        has_retries = self._reader().folder.exists(RETRY)
        for place in (*likely, *(reversed(others) if has_retries else ())):
            at = self._keys_of(place).get(key)
            if at is not None:
                return self.index.shards[place].first_sample + at
        raise KeyError(f"{self.folder.url}: no sample has the key {key!r}")

    def _keys_of(self, place: int) -> dict[str, int]:
        if place not in self._keys:
            keys = keys_in(self._reader().folder, self.index.shards[place])
            self._keys[place] = {key: row for row, key in enumerate(keys)}
        return self._keys[place]
