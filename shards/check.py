"""Checks one shard: its tar, sidecar and commit against each other."""

from __future__ import annotations

import hashlib
import io
import json
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import RunError
from infra.storage import Folder, storage_failures
from shards.layout import STATS_SUFFIX, Status
from shards.placeholder import in_tar, removed_key
from shards.sample import IMAGES, split_name
from shards.tar import Member, scan

PIECE_BYTES = 1 << 22
_OFFSETS = ("member", "offset", "size", "image_offset", "image_bytes")
_REFUSALS = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
"""What an object store says of one object, not of itself."""


@dataclass(frozen=True)
class Fault:
    """One fault: in which shard, at which key (both may be empty), what it is, and of what kind.

    Kinds: `torn` (files of the shard are damaged or incomplete), `missing`, `unreadable` (what it holds could not be
    looked at), `content` (whole, yet its parts disagree), `index`, `stranger` (a file that belongs to nothing).
    """

    shard: str
    key: str
    what: str
    kind: str = "content"


@dataclass
class Found:
    """What a shard turned out to hold; digests and addresses stay None where they were not computed.

    `ours` tells whether its commit is one of this format, not only one of its name; None for one that is damaged.
    Of its `samples`, so many are `holes`: they were taken down.
    """

    name: str
    ours: bool | None = False
    samples: int = 0
    holes: int = 0
    tar_bytes: int = 0
    tar_sha256: str | None = None
    sidecar_bytes: int | None = None
    sidecar_sha256: str | None = None
    ends: npt.NDArray[np.int64] | None = None
    faults: list[Fault] = field(default_factory=list)

    def fault(self, what: str, key: str = "", kind: str = "content") -> None:
        """Note a fault of this shard."""
        self.faults.append(Fault(self.name, key, what, kind))


@dataclass
class Sample:
    """One sample as it lies in the tar: `[start, end)`, its members by extension, its texts."""

    key: str
    start: int
    end: int = 0
    is_hole: bool = False
    members: dict[str, Member] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)


def check_shard(folder: Folder, name: str, quick: bool) -> Found:
    """Check one shard; `quick` compares sizes with the commit alone.

    Whatever is wrong with it is a fault, so that the other shards are looked at. Only an object store that is away is
    none: its errors are passed on.
    """
    found = Found(name)
    try:
        _check(folder, found, quick)
    except storage_failures() as error:
        if not folder.is_local and not isinstance(error, _REFUSALS):
            raise
        found.fault(f"cannot be opened ({_in_words(error)})", kind="unreadable")
    except (pa.ArrowException, ValueError, TypeError, AttributeError, LookupError, RecursionError, RunError) as error:
        found.fault(f"cannot be checked ({_in_words(error)})")
    return found


def _in_words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _check(folder: Folder, found: Found, quick: bool) -> None:
    name, stats = found.name, read_commit(folder, found)
    try:
        found.tar_bytes = folder.size(f"{name}.tar")
    except FileNotFoundError:
        found.fault(f"{name}.tar is missing", kind="torn")
        return
    _same(found, "bytes in the tar", stats.get("tar_bytes"), found.tar_bytes)
    sidecar = _sidecar_bytes(folder, found, quick)
    _same(found, "bytes in the sidecar", stats.get("sidecar_bytes"), found.sidecar_bytes)
    successes = stats.get("successes", 0)
    if type(successes) is not int:
        found.fault(f"the commit counts {successes!r} samples, which is no number")
    if quick:
        found.holes = holes if type(holes := stats.get("holes", 0)) is int else 0
        found.samples = found.holes + (successes if type(successes) is int else 0)
        return
    samples = _read_tar(folder, found, keep=sidecar is not None)
    _same(found, "the tar's SHA-256", stats.get("tar_sha256"), found.tar_sha256)
    _same(found, "the sidecar's SHA-256", stats.get("sidecar_sha256"), found.sidecar_sha256)
    if "successes" in stats and successes != found.samples - found.holes:
        found.fault(f"the commit counts {successes} samples, the tar holds {found.samples - found.holes}")
    if found.ours and stats.get("holes", 0) != found.holes:
        found.fault(f"the commit counts {stats.get('holes', 0)} samples taken down, the tar {found.holes}")
    if sidecar is not None:
        _check_sidecar(found, sidecar, samples, stats)


def read_commit(folder: Folder, found: Found) -> dict[str, Any]:
    """Return a shard's `_stats.json`, {} where there is none or it is damaged (a fault); tell whether it is ours."""
    try:
        stats = folder.read_json(found.name + STATS_SUFFIX)
    except FileNotFoundError:
        return {}
    except (RunError, RecursionError) as error:
        stats, what = None, str(error)
    else:
        what = f"{found.name}{STATS_SUFFIX} is not a commit"
    if not isinstance(stats, dict):
        found.ours = None
        found.fault(what, kind="torn")
        return {}
    found.ours = "tar_sha256" in stats
    return stats


def _same(found: Found, what: str, told: Any, there: Any) -> None:
    if told is not None and there is not None and told != there:
        found.fault(f"{what}: {told} in the commit, {there} there", kind="torn")


def _sidecar_bytes(folder: Folder, found: Found, quick: bool) -> bytes | None:
    name = f"{found.name}.parquet"
    try:
        if quick:
            found.sidecar_bytes = folder.size(name)
            return None
        data = folder.read(name)
    except FileNotFoundError:
        if found.ours:
            found.fault(f"{name} is missing", kind="torn")
        return None
    found.sidecar_bytes, found.sidecar_sha256 = len(data), hashlib.sha256(data).hexdigest()
    return data


class _Hashing(io.RawIOBase):
    """Reads a stream from its beginning to its end and digests every byte on the way; a seek reads on."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.at, self.digest = stream, 0, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        self.at += len(data)
        self.digest.update(data)
        return data

    def seek(self, at: int, whence: int = 0) -> int:
        while self.at < at and self.read(min(PIECE_BYTES, at - self.at)):
            pass
        return self.at

    def rest_is_empty(self) -> bool:
        """Read to the end; tell whether only zeros were left."""
        empty = True
        while data := self.read(PIECE_BYTES):
            empty = empty and not data.strip(b"\0")
        return empty


def _read_tar(folder: Folder, found: Found, *, keep: bool) -> list[Sample]:
    """Read a tar to its last byte; return its samples if they are to `keep`."""
    samples: list[Sample] = []
    seen: set[str] = set()
    ends, last = array("q"), ""
    with folder.open(f"{found.name}.tar") as stream:
        hashing = _Hashing(stream)
        damaged = False
        try:
            for sample in _samples(found, hashing):
                if sample.key in seen:
                    found.fault("the members of this key are not adjacent", sample.key)
                seen.add(sample.key)
                if last and found.ours and sample.key <= last:
                    found.fault(f"comes after {last}: the keys are not in order", sample.key)
                last = sample.key
                ends.append(sample.end)
                found.holes += sample.is_hole
                _check_members(found, sample)
                if keep:
                    samples.append(sample)
        except ValueError as error:
            damaged = True
            after = f" after sample {last}" if last else ""
            found.fault(f"damaged tar{after}: {error}", last, "torn")
        if not hashing.rest_is_empty() and not damaged:
            found.fault("there are bytes after the archive's end", kind="torn")
        found.tar_sha256 = hashing.digest.hexdigest()
    found.samples = len(ends)
    found.ends = np.array(ends, dtype=np.int64)
    return samples


def _samples(found: Found, stream: _Hashing) -> Iterator[Sample]:
    """Group a tar's members by key, as webdataset does."""
    current: Sample | None = None
    end = 0
    for member, text in scan(stream, _is_text):  # type: ignore[arg-type]
        gone = removed_key(member.name)
        split = split_name(member.name) if gone is None else (gone, "")
        if split is None:
            continue
        key, extension = split
        if current is None or key != current.key:
            if current is not None:
                yield current
            current = Sample(key, end, is_hole=gone is not None)
        if extension in current.members:
            found.fault(f"{member.name} is there twice", key)
        current.members[extension] = member
        if text is not None:
            current.texts[extension] = text
        current.end = end = member.end
    if current is not None:
        yield current


def _is_text(name: str) -> bool:
    return name.endswith((".txt", ".json"))


def _check_members(found: Found, sample: Sample) -> None:
    if found.ours and not sample.is_hole:
        extensions = list(sample.members)
        if len(extensions) != 3 or extensions[0] not in IMAGES or extensions[1:] != ["txt", "json"]:
            found.fault(f"has the members {', '.join(extensions)}, not image, txt, json", sample.key)
    for extension, text in sample.texts.items():
        try:
            value: Any = json.loads(text) if extension == "json" else text.decode()
        except (ValueError, RecursionError) as error:
            found.fault(f"its {extension} cannot be decoded ({error})", sample.key)
            continue
        told = value.get("key") if isinstance(value, dict) else None
        if found.ours and extension == "json" and told != sample.key:
            found.fault("its json is not of this key", sample.key)


def _check_sidecar(found: Found, data: bytes, samples: list[Sample], stats: dict[str, Any]) -> None:
    try:
        table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowException, OSError) as error:
        found.fault(f"the sidecar cannot be read ({' '.join(str(error).split())})", kind="torn")
        return
    if not {"key", "status"} <= set(table.schema.names):
        return
    if "count" in stats and stats["count"] != len(table):
        found.fault(f"the commit counts {stats['count']} rows, the sidecar holds {len(table)}")
    told = Counter(table["status"].to_pylist())
    if "by_status" in stats and stats["by_status"] != dict(told):
        found.fault(f"by status: {stats['by_status']} in the commit, {dict(told)} in the sidecar")
    columns = [name for name in ("key", "status", "caption", *_OFFSETS) if name in table.schema.names]
    rows = table.filter(in_tar(table)).select(columns).to_pylist()
    by_key = {sample.key: sample for sample in samples}
    lost = []
    for row in rows:
        sample = by_key.pop(row["key"], None)
        if sample is None:
            lost.append(row["key"])
        else:
            _check_row(found, row, sample)
    if lost and any(fault.kind == "torn" for fault in found.faults):
        found.fault(f"{len(lost)} samples are lost with it, from this key on", lost[0], "torn")
    else:
        for key in lost:
            found.fault("is a success in the sidecar and not in the tar", key)
    for key in by_key:
        found.fault("is in the tar and no success in the sidecar", key)
    shared = {row["key"] for row in rows}
    if [row["key"] for row in rows] != [sample.key for sample in samples if sample.key in shared]:
        found.fault("the tar and the sidecar hold the keys in different orders")


def _check_row(found: Found, row: dict[str, Any], sample: Sample) -> None:
    if sample.is_hole != (row["status"] != Status.SUCCESS):
        found.fault("was taken down in the tar or in the sidecar, and not in both", sample.key)
    caption, text = row.get("caption"), sample.texts.get("txt")
    if found.ours and not isinstance(caption, str | None):
        found.fault("its caption in the sidecar is no text", sample.key)
    if isinstance(caption, str) and text is not None and caption.encode("utf-8", "replace") != text:
        found.fault("its caption in the sidecar is not its txt", sample.key)
    if "offset" not in row:
        return
    image = next((sample.members[name] for name in IMAGES if name in sample.members), None)
    there = {
        "offset": sample.start,
        "size": sample.end - sample.start,
        "member": image.name if image else None,
        "image_offset": image.start if image else None,
        "image_bytes": image.size if image else None,
    }
    for name in _OFFSETS:
        if row.get(name) != there[name]:
            found.fault(f"{name}: {row.get(name)} in the sidecar, {there[name]} in the tar", sample.key)
