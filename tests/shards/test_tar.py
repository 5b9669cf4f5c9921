"""Tar members: ours to the byte, and every dialect and damage that a reader meets."""

from __future__ import annotations

import contextlib
import io
import tarfile
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import sample
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


def raw(name: str, kind: bytes, size: int, content: bytes = b"") -> bytes:
    """One member of any kind, whatever size its header claims."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(padded(len(content)) - len(content))


def record(name: str, value: str) -> bytes:
    """One record of a pax header."""
    body = f" {name}={value}\n".encode()
    length = next(size for size in range(len(body), len(body) + 20) if size == len(body) + len(str(size)))
    return str(length).encode() + body


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_have_no_content_whatever_they_claim(kind: bytes) -> None:
    data = header("a.txt", 0) + raw("b.txt", kind, 1 << 20) + header("c.txt", 3) + b"abc" + bytes(509) + END
    assert [member.name for member in members(data)] == ["a.txt", "c.txt"]
    assert [member.name for member, _ in scan(io.BytesIO(data))] == ["a.txt", "c.txt"]
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [info.name for info in tar if info.isreg()] == ["a.txt", "c.txt"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (raw("a.jpg", tarfile.GNUTYPE_SPARSE, 512, bytes(512)), "byte 0: a sparse member"),
        (
            raw("x", tarfile.XHDTYPE, 22, record("GNU.sparse.major", "1")) + header("a.jpg", 0),
            "byte 0: a sparse member",
        ),
        (
            raw("x", tarfile.XHDTYPE, 31, record("size", "9" * 20)) + header("a.jpg", 0),
            "byte 1024: a member of 9+ bytes; an archive has 2199023255552 at most",
        ),
        (
            raw("x", tarfile.XHDTYPE, 5013, record("size", "9" * 5000)) + header("a.jpg", 0),
            "byte 5632: a member of 2199023255553 bytes",
        ),
        (raw("a.jpg", tarfile.REGTYPE, 1 << 60), r"byte 0: a member of \d+ bytes"),
        (raw("x", tarfile.XGLTYPE, 1 << 60), r"byte 0: a member of \d+ bytes"),
        (raw("x", tarfile.XHDTYPE, 9, b"30 path=a") + header("a.jpg", 0), "damaged extended header"),
        (raw("x", tarfile.XHDTYPE, 9, b"0 path=a\n") + header("a.jpg", 0), "damaged extended header"),
    ],
)
def test_what_no_archive_of_samples_holds_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        members(data + END)
    with pytest.raises(ValueError, match=words):
        list(scan(io.BytesIO(data + END)))


@pytest.mark.parametrize("name", ["000010002.jpg", "é.txt", "a" * 100, "a/b/c.json", "p" * 60 + "/" + "q" * 60])
@pytest.mark.parametrize("size", [0, 1, 29_000, 8**11 - 1])
def test_a_header_is_what_tarfile_writes(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    assert header(name, size) == info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")


@given(st.integers(0, 511), st.integers(0, 255), st.booleans())
@settings(max_examples=400)
def test_what_is_read_in_one_look_is_what_the_long_way_reads(at: int, value: int, is_summed: bool) -> None:
    content = b"p" * 700
    block = bytearray(header("000120034.jpg", len(content)))
    block[at] = value
    if is_summed:  # a sum that is right for what the header now says
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    data = bytes(block) + content + bytes(padded(700) - 700)
    quick = sample._plain_sample(data, 0, len(data))
    if quick is not None:
        assert quick == sample._any_sample(data)


def test_members_named_as_the_stream_names_its_own_are_passed_over() -> None:
    files = b""
    for name, content in (("a.jpg", b"i"), ("a.txt", b"t"), ("a.__hole__", b"99"), ("a.__corpus__", b"7")):
        files += header(name, len(content)) + content + bytes(512 - len(content))
    assert sample.parse(files, ("image", "txt")) == {"__key__": "a", "jpg": b"i", "txt": b"t"}
