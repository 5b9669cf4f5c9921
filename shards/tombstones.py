"""What was taken out of a corpus, when and why: `tombstones/`, which keeps it from coming back.

A tombstone is written before anything is changed and says all that is to be done, so that a removal that was
interrupted is ended as it was begun; its `_done.json` is written last.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from infra.errors import RunError, UserError
from infra.storage import Folder
from shards.barred import Barred, Entry, Kind
from shards.layout import TOMBSTONES, key_address, shard_name

SUFFIX, DONE_SUFFIX = ".jsonl", "_done.json"


@dataclass(frozen=True)
class Removed:
    """A sample that was taken out: its keys in `raw/` and `final/` (None where it was not there), and what matched.

    `shard` is the raw shard it lay in. `placed` tells that it keeps its place among the samples of `final/`, as a
    hole. `url` is its URL's digest (`shards.urls.digest_of`), `sha256` its body's.
    """

    key: str
    shard: str | None
    final: str | None
    placed: bool
    url: str | None
    sha256: str | None
    matched: str

    @property
    def final_shard(self) -> str | None:
        """The shard of `final/` it lay in."""
        return None if self.final is None else shard_name(key_address(self.final)[0])


@dataclass(frozen=True)
class Tombstone:
    """One removal: `number`, `time` (ISO 8601, UTC), `reason`, what was asked for, what was found.

    `totals` are those of the corpus' stages once it is done, by stage.
    """

    number: int
    time: str
    reason: str
    entries: tuple[Entry, ...]
    removed: tuple[Removed, ...]
    totals: dict[str, dict[str, Any]]

    @property
    def name(self) -> str:
        """The file's name in the corpus."""
        return tombstone_name(self.number)


def tombstone_name(number: int) -> str:
    """Return a tombstone's name in the corpus."""
    return f"{TOMBSTONES}/{_stem(number)}{SUFFIX}"


def numbers(corpus: Folder) -> list[int]:
    """Return the numbers of a corpus' tombstones, ascending."""
    return [int(name.removesuffix(SUFFIX)) for name in (corpus / TOMBSTONES).names(SUFFIX)]


def open_number(corpus: Folder) -> int | None:
    """Return the number of the removal that was begun and not ended; None where there is none."""
    names = (corpus / TOMBSTONES).names()
    return next(
        (
            int(name.removesuffix(SUFFIX))
            for name in names
            if name.endswith(SUFFIX) and name.removesuffix(SUFFIX) + DONE_SUFFIX not in names
        ),
        None,
    )


def check_none_is_open(corpus: Folder) -> None:
    """Raise UserError if a removal was interrupted: what its shards hold is known once it is ended."""
    number = open_number(corpus)
    if number is not None:
        raise UserError(
            f"{corpus.url}: a removal was interrupted ({tombstone_name(number)}); "
            "end it with `pairmill remove` and the same list first"
        )


def write(corpus: Folder, tombstone: Tombstone) -> None:
    """Write a tombstone: a line for the whole, one for each entry, one for each sample."""
    head = {
        "time": tombstone.time, "reason": tombstone.reason, "entries": len(tombstone.entries),
        "removed": len(tombstone.removed), "totals": tombstone.totals,
    }  # fmt: skip
    lines = [head, *map(_of_entry, tombstone.entries), *map(asdict, tombstone.removed)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    corpus.write(tombstone.name, text.encode("ascii"))


def read(corpus: Folder, number: int) -> Tombstone:
    """Read a tombstone. Raises RunError where it is damaged."""
    name = tombstone_name(number)
    try:
        # Earlier versions escaped no character: a reason may hold one that `splitlines` takes for a line's end.
        head, *lines = map(json.loads, corpus.read(name).decode().removesuffix("\n").split("\n"))
        entries = tuple(_entry(line, number) for line in lines[: head["entries"]])
        removed = tuple(Removed(**line) for line in lines[head["entries"] :])
        if len(removed) != head["removed"]:
            raise ValueError(f"{len(removed)} samples of {head['removed']}")
        return Tombstone(number, head["time"], head["reason"], entries, removed, head["totals"])
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(f"{corpus.path(name)}: damaged ({error}); restore it from a copy of the corpus") from None


def finish(corpus: Folder, number: int, places: dict[str, dict[str, list[int]]]) -> None:
    """Note that a removal is done: by stage and shard, the places that became holes."""
    corpus.write_json(f"{TOMBSTONES}/{_stem(number)}{DONE_SUFFIX}", {"places": places})


def all_removed(corpus: Folder) -> dict[str, Removed]:
    """Return every sample that was taken out of a corpus, by its key in `raw/`."""
    return {one.key: one for tombstone in _all(corpus) for one in tombstone.removed}


def barred(corpus: Folder) -> Barred:
    """Return what must not come back: what was asked for, and of what was found its key, URL and body."""
    return Barred(entry for tombstone in _all(corpus) for entry in _bars(tombstone))


def _all(corpus: Folder) -> Iterator[Tombstone]:
    return (read(corpus, number) for number in numbers(corpus))


def _bars(tombstone: Tombstone) -> Iterator[Entry]:
    yield from tombstone.entries
    for one in tombstone.removed:
        for kind, value in ((Kind.KEY, one.key), (Kind.URL, one.url), (Kind.SHA256, one.sha256)):
            if value:
                yield Entry(kind, value, source=tombstone.number)


def _of_entry(entry: Entry) -> dict[str, Any]:
    found = {"kind": entry.kind.value, "value": entry.value}
    return found | ({"distance": entry.distance} if entry.kind == Kind.PDQ else {})


def _entry(line: dict[str, Any], number: int) -> Entry:
    return Entry(Kind(line["kind"]), line["value"], line.get("distance", 0), source=number)


def _stem(number: int) -> str:
    return f"{number:05d}"
