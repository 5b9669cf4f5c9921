"""A tombstone reads back as it was written, whatever its reason holds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from infra.errors import RunError
from infra.storage import Folder
from shards import tombstones
from shards.barred import Entry, Kind
from shards.tombstones import Removed, Tombstone

LINE_ENDS = [chr(code) for code in range(sys.maxunicode + 1) if len(f"a{chr(code)}b".splitlines()) > 1]


def tombstone(reason: str) -> Tombstone:
    entries = (Entry(Kind.HOST, "a.example"), Entry(Kind.PDQ, "ab" * 32, 7))
    removed = Removed("000010002", "00001", "000000004", True, "12" * 32, None, "host a.example")
    return Tombstone(3, "2026-05-03T10:00:00+00:00", reason, entries, (removed,), {"raw": {"rows_in": 4}})


def read_back(corpus: Folder) -> Tombstone:
    (number,) = tombstones.numbers(corpus)
    return tombstones.read(corpus, number)


@pytest.mark.parametrize("end", [*LINE_ENDS, "\ud800"], ids=ascii)
def test_a_reason_may_hold_any_character(tmp_path: Path, end: str) -> None:
    corpus, told = Folder(tmp_path), tombstone(f"a letter{end}of 3 May: déjà vu")
    tombstones.write(corpus, told)
    assert corpus.read(told.name).isascii()
    assert read_back(corpus) == told
    assert tombstones.barred(corpus).row("000010002", "http://b.example/") is not None


@pytest.mark.parametrize("end", [end for end in LINE_ENDS if ord(end) > 0x1F], ids=ascii)
def test_one_of_an_earlier_version_that_escaped_nothing_is_read(tmp_path: Path, end: str) -> None:
    corpus, told = Folder(tmp_path), tombstone(f"a letter{end}of 3 May")
    tombstones.write(corpus, told)
    head, *lines = corpus.read(told.name).decode().split("\n")
    unescaped = json.dumps(json.loads(head), ensure_ascii=False)
    assert end in unescaped
    corpus.write(told.name, "\n".join([unescaped, *lines]).encode())
    assert read_back(corpus) == told


@pytest.mark.parametrize("lost", ["a line", "the end of a line", "all"])
def test_a_damaged_one_is_named(tmp_path: Path, lost: str) -> None:
    corpus, told = Folder(tmp_path), tombstone("")
    tombstones.write(corpus, told)
    data = corpus.read(told.name)
    left = {"a line": data[: data[:-1].rindex(b"\n") + 1], "the end of a line": data[:-20], "all": b""}[lost]
    corpus.write(told.name, left)
    with pytest.raises(RunError, match=r"tombstones/00003\.jsonl: damaged"):
        read_back(corpus)
