"""The list of what is to go: every kind of line, and malformed ones, each named with how to mend it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedup.takedown import remove
from dedup.takedown_list import parse, read_list
from infra.errors import UserError
from infra.storage import Folder
from shards.barred import Barred, Entry, Kind
from tests.dedup.conftest import LOCAL

HEX = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("line", "mend"),
    [
        ("http://a.example/x.jpg", "'http://a.example/x.jpg' is no kind of entry; begin with url URL"),
        ("url a.example/x.jpg", "is no http or https URL; write it whole"),
        ("url ftp://a.example/x", "is no http or https URL"),
        ("url http://a.example/a b.jpg", "url with 2 values; give one value"),
        ("url", "url with 0 values"),
        ("host https://a.example/", "is no host; give its name alone"),
        ("host a.example:8080", "is no host"),
        ("host *a.example", "is no host"),
        ("key 12", "is no key; give the digits"),
        ("final 00012003x", "is no key"),
        (f"key {'1' * 30}", "is no key"),
        (f"final {'1' * 5000}", "is no key"),
        ("key ٠٠٠١٢٠٠٣٤", "is no key"),
        (f"sha256 {HEX[1:]}", "is no SHA-256; give the 64 hex digits"),
        (f"pdq {HEX}", "pdq with 1 values; give a hash and a distance"),
        (f"pdq {HEX} 65", "distance '65'; give a whole number of bits, 0 to 64"),
        (f"pdq {HEX} -1", "distance '-1'"),
        (f"pdq {HEX[:-1]}g 3", "is no PDQ hash"),
    ],
)
def test_a_malformed_line_is_named_with_how_to_mend_it(line: str, mend: str) -> None:
    entries, (wrong,) = parse(["# a list", "", line, "host a.example"])
    assert wrong.startswith("line 3: ")
    assert mend in wrong
    assert [str(one) for one in entries] == ["host a.example"]


def test_all_are_named_at_once_and_nothing_is_done(corpus: Folder, tmp_path: Path) -> None:
    where = tmp_path / "list.txt"
    where.write_text("key 000020005\n" + "\n".join(f"kye {number}" for number in range(60)))
    with pytest.raises(UserError) as caught:
        remove(corpus.url, str(where), LOCAL)
    told = str(caught.value)
    assert all(f"line {number}: 'kye' is no kind" in told for number in range(2, 62))
    assert "60 malformed lines, nothing was done" in told
    assert not (corpus / "tombstones").exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"", "holds no entry"), (b"# nothing\n", "holds no entry"), (b"url http://a.example/\xff", "no text in UTF-8")],
)
def test_a_list_that_is_none(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "list").write_bytes(content)
    with pytest.raises(UserError, match=told):
        read_list(str(tmp_path / "list"))
    with pytest.raises(UserError, match="no such list"):
        read_list(str(tmp_path / "another"))
    with pytest.raises(UserError, match="a folder, no list"):
        read_list(str(tmp_path))


@pytest.mark.parametrize("character", list("\v\f\x1c\x1d\x1e\x85\u2028\u2029"), ids=ascii)
def test_a_remark_goes_on_to_the_end_of_its_line(tmp_path: Path, character: str) -> None:
    (tmp_path / "list").write_bytes(f"host a.example # not{character}host b.example\r\nkey 000000001\n".encode())
    assert [str(one) for one in read_list(str(tmp_path / "list"))] == ["host a.example", "key 000000001"]


def test_comments_cases_and_repeats() -> None:
    entries, wrong = parse(
        ["\tHOST a.example", "host A.Example  # by letter", "host bücher.example", "host a.example.",
         "url http://a.example/x#y", "url https://A.example:443/x", "host *.a.example"]
    )  # fmt: skip
    assert [line.split(":")[0] for line in wrong] == ["line 1"]
    assert [(one.kind, one.value) for one in entries if one.kind == Kind.HOST] == [
        (Kind.HOST, "a.example"), (Kind.HOST, "xn--bcher-kva.example"), (Kind.HOST, "*.a.example"),
    ]  # fmt: skip
    assert sum(one.kind == Kind.URL for one in entries) == 1


@given(st.lists(st.text(max_size=40), max_size=20))
def test_any_text_is_an_entry_or_a_named_line(lines: list[str]) -> None:
    entries, wrong = parse(lines)
    assert len(entries) + len(wrong) <= len(lines)
    Barred(entries)


@given(st.binary(min_size=32, max_size=32), st.sets(st.integers(0, 255), max_size=70), st.integers(0, 64))
def test_a_picture_is_barred_up_to_the_distance(phash: bytes, flipped: set[int], distance: int) -> None:
    other = bytearray(phash)
    for bit in flipped:
        other[bit // 8] ^= 1 << bit % 8
    barred = Barred([Entry(Kind.PDQ, phash.hex(), distance)])
    assert (barred.picture(other.hex()) is not None) == (len(flipped) <= distance)


@pytest.mark.parametrize(
    ("entry", "barred", "free"),
    [
        (
            "a.example",
            ["http://a.example/", "https://A.example:8443/x?y"],
            ["http://b.a.example/", "http://ba.example/"],
        ),
        ("*.a.example", ["http://a.example/", "http://c.b.a.example/x"], ["http://ba.example/", "http://example/"]),
    ],
)
def test_a_host_is_barred(entry: str, barred: list[str], free: list[str]) -> None:
    found = Barred([Entry(Kind.HOST, entry)])
    assert all(found.url(url) for url in barred)
    assert not any(found.url(url) for url in [*free, "", None, "no url", "http://[]@"])
