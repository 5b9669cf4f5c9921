"""What is not to be in a corpus: URLs, hosts, keys, bodies and pictures, and whether a row is of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from shards.urls import digest_of, host_of

MAX_DISTANCE = 64
"""Largest distance of two PDQ hashes that may be asked for, in bits: unlike pictures are about 128 apart."""
ANY_BELOW = "*."


class Kind(StrEnum):
    """What an entry goes by."""

    URL = "url"
    HOST = "host"
    KEY = "key"
    FINAL = "final"
    SHA256 = "sha256"
    PDQ = "pdq"


@dataclass(frozen=True)
class Entry:
    """One thing that is barred.

    `value` is, by kind: a URL's digest (`shards.urls.digest_of`); a host, or `*.` and a host for it and all below it; a
    key in `raw/`, or in `final/`; the SHA-256 of a body; 64 hex digits of a PDQ hash, with the largest `distance` in
    bits. `shown` is what a person gave. `source` tells which tombstone it is of, 0 for none.
    """

    kind: Kind
    value: str
    distance: int = 0
    shown: str = field(default="", compare=False)
    source: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return f"{self.kind} {self.value}" + (f" {self.distance}" if self.kind == Kind.PDQ else "")


class Barred:
    """Entries, to ask whether a row is of one. The answer is that entry, or None."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._by: dict[Kind, dict[str, Entry]] = {kind: {} for kind in Kind}
        self._pictures = [one for one in entries if not self._noted(one)]
        self._hashes = np.array([_words(one.value) for one in self._pictures], np.uint64).reshape(-1, 4)
        self._distances = np.array([one.distance for one in self._pictures], np.int64)

    def _noted(self, entry: Entry) -> bool:
        if entry.kind == Kind.PDQ:
            return False
        self._by[entry.kind].setdefault(entry.value, entry)
        return True

    def __bool__(self) -> bool:
        return self.has_pictures or any(self._by.values())

    @property
    def has_pictures(self) -> bool:
        """Whether anything goes by the look of a picture."""
        return bool(self._pictures)

    def row(self, key: str, url: str | None) -> Entry | None:
        """Return what bars a row by its key in `raw/` or its URL."""
        return self._by[Kind.KEY].get(key) or self.url(url)

    def url(self, url: str | None) -> Entry | None:
        """Return what bars a URL, by itself or by its host."""
        found = None
        if url and self._by[Kind.URL]:
            found = self._by[Kind.URL].get(digest_of(url) or "")
        if found is None and url and self._by[Kind.HOST]:
            found = self._host(host_of(url.strip()) or "")
        return found

    def _host(self, host: str) -> Entry | None:
        hosts = self._by[Kind.HOST]
        found = hosts.get(host)
        while found is None and host:
            found = hosts.get(ANY_BELOW + host)
            host = host.partition(".")[2]
        return found

    def body(self, sha256: str | None) -> Entry | None:
        """Return what bars a body, by its SHA-256 in hex."""
        return self._by[Kind.SHA256].get(sha256) if sha256 else None

    def picture(self, phash: str | None) -> Entry | None:
        """Return what bars a picture, by its PDQ hash in hex."""
        if not phash or not self._pictures or len(phash) != 64:
            return None
        bits = np.bitwise_count(self._hashes ^ _words(phash)).sum(axis=1, dtype=np.int64)
        near = np.flatnonzero(bits <= self._distances)
        return self._pictures[int(near[0])] if len(near) else None


def _words(phash: str) -> npt.NDArray[np.uint64]:
    return np.frombuffer(bytes.fromhex(phash), np.uint64)
