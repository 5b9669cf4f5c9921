"""Tar members: ours to the byte, and every dialect and damage that a reader meets."""

from __future__ import annotations

import contextlib
import io
import tarfile
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.tar import BLOCK_BYTES, END, header, members, padded, scan

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def archive(files: Mapping[str, bytes], dialect: int, mtime: float = 1.5) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=dialect) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            # A time with a fraction makes the pax dialect put an extended header before the member.
            info.size, info.mtime = len(content), mtime
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


@pytest.mark.parametrize("dialect", FORMATS)
def test_every_dialect_is_read(dialect: str) -> None:
    files = {"a.jpg": b"x" * 700, "a.txt": b"", f"long/{'n' * 90}.txt": b"y" * 512, "é.json": b"{}"}
    data = archive(files, FORMATS[dialect])
    found = {member.name: data[member.start : member.start + member.size] for member in members(data)}
    assert found == files
    scanned = list(scan(io.BytesIO(data), lambda name: name.endswith(".txt")))
    assert [member for member, _ in scanned] == members(data)
    assert {member.name: content for member, content in scanned if content is not None} == {
        name: content for name, content in files.items() if name.endswith(".txt")
    }


@given(st.lists(st.tuples(st.text("abz09_é", min_size=1, max_size=40), st.binary(max_size=1200)), max_size=6))
def test_what_is_written_is_read_by_us_and_by_tarfile(files: list[tuple[str, bytes]]) -> None:
    data = b"".join(
        header(name, len(content)) + content + bytes(padded(len(content)) - len(content)) for name, content in files
    )
    data += END
    ours = [(member.name, data[member.start : member.start + member.size]) for member in members(data)]
    assert ours == files
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [(info.name, info.mtime, info.uid) for info in tar] == [(name, 0, 0) for name, _ in files]


@given(st.data())
def test_a_cut_or_flipped_archive_never_passes_for_another(data: st.DataObject) -> None:
    whole = b"".join(header(f"{n}.txt", 600) + bytes([65 + n]) * 600 + bytes(424) for n in range(3)) + END
    cut = data.draw(st.integers(1, len(whole) - len(END)))
    expected = [member for member in members(whole) if member.start + member.size <= cut]
    with contextlib.suppress(ValueError):
        assert members(whole[:cut]) == expected
    with pytest.raises(ValueError, match="byte"):
        list(scan(io.BytesIO(whole[:cut]), lambda name: True))
    at = data.draw(st.integers(0, BLOCK_BYTES - 1))
    flipped = bytearray(whole)
    flipped[1536 + at] ^= 1 << data.draw(st.integers(0, 7))
    with contextlib.suppress(ValueError):
        # A digit may turn into a blank of the same meaning; nothing else passes.
        assert members(bytes(flipped)) == members(whole)


@pytest.mark.parametrize("name", ["../evil.jpg", "a/../../evil.jpg", "/etc/evil.jpg", "a\\evil.jpg"])
def test_a_name_that_climbs_out_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="stays in its folder"):
        header(name, 1)
    with pytest.raises(ValueError, match="leaves its folder"):
        members(archive({name: b"x"}, tarfile.USTAR_FORMAT))


def test_an_endless_extended_header_is_refused() -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 30
    with pytest.raises(ValueError, match="extended header of 1073741824 bytes"):
        members(info.tobuf(tarfile.GNU_FORMAT))


@pytest.mark.parametrize("name", ["000010002.jpg", "é.txt", "a" * 100, "a/b/c.json", "p" * 60 + "/" + "q" * 60])
@pytest.mark.parametrize("size", [0, 1, 29_000, 8**11 - 1])
def test_a_header_is_what_tarfile_writes(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    assert header(name, size) == info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
