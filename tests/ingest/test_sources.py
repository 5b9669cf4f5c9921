"""Rows from files of every kind, and what is said when they cannot be had."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import UserError
from ingest.sources import Columns, find_sources, read_rows

ROWS = [
    {"url": "http://a.example/1.jpg", "caption": 'one, "quoted"', "licence": "CC0"},
    {"url": "http://a.example/2.jpg", "caption": "two\nlines\tand a tab", "licence": ""},
    {"url": "http://b.example/3.jpg", "caption": "трос 猫", "licence": "MIT"},
]
COLUMNS = Columns("url", "caption")


def csv_text(rows: list[dict[str, str]], separator: str) -> str:
    def quoted(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    lines = [separator.join(rows[0]), *(separator.join(map(quoted, row.values())) for row in rows)]
    return "\n".join(lines) + "\n"


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    kind = path.suffixes[0]
    if kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    if kind == ".jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows)
    elif kind == ".txt":
        text = "".join(row["url"] + "\n" for row in rows)
    else:
        text = csv_text(rows, "\t" if kind == ".tsv" else ",")
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def read(urls: Path | str, columns: Columns = COLUMNS) -> list[dict[str, Any]]:
    return [row for batch in read_rows(find_sources(str(urls)), columns) for row in batch.to_pylist()]


@pytest.mark.parametrize("name", ["r.parquet", "r.csv", "r.tsv", "r.jsonl", "r.csv.gz", "r.tsv.gz", "r.jsonl.gz"])
def test_every_kind_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    rows = [{**row, "caption": row["caption"].replace("\n", " ")} for row in ROWS] if "tsv" in name else ROWS
    assert read(write(tmp_path / name, rows)) == rows


def test_a_tsv_is_read_as_its_writers_meant_it(tmp_path: Path) -> None:
    """Quoted as pandas does it, unquoted as CC3M is, with a byte order mark and lines that end in CR LF."""
    lines = ["url\tcaption", '1\t"5"" nails"', '2\t5" nails', '3\t"a "b" c', '4\t""', "5\t", '6\t"tab\there"', "7\t'"]
    (tmp_path / "r.tsv").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    captions = ['5" nails', '5" nails', '"a "b" c', "", "", "tab\there", "'"]
    assert read(tmp_path / "r.tsv") == [
        {"url": str(number), "caption": caption} for number, caption in enumerate(captions, 1)
    ]


@given(st.lists(st.text(st.sampled_from("ab\"\t,' é"), max_size=8).filter(bool), max_size=12))
def test_no_line_of_a_tsv_vanishes(lines: list[str]) -> None:
    """One row for each, whatever quotes are in it; a line with the header's tabs and no quote is taken as it is."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "r.tsv"
        path.write_text("\n".join(["url\tcaption", "http://a.example/0\tone", *lines, ""]))
        _, *rows = read(path)
    assert len(rows) == len(lines)
    for line, row in zip(lines, rows, strict=True):
        if '"' not in line and line.count("\t") == 1:
            assert f"{row['url']}\t{row['caption']}" == line
        if row["url"] is None:
            assert row["caption"] == line


def test_one_stray_quote_costs_no_row_and_a_ragged_line_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [
        "url\tcaption\tn",
        'u1\t"a cat\t1',
        "u2\ta dog\t2",
        'u3\ta "big" fish"\t3',
        "u4\tno number",
        "u5\tone\ttwo\t3",
    ]
    path = tmp_path / "r.tsv"
    path.write_text("\n".join(lines))
    rows = read(path)
    assert [row["url"] for row in rows] == ["u1", "u2", "u3", None, None]
    assert [row["caption"] for row in rows] == ['"a cat', "a dog", 'a "big" fish"', lines[4], lines[5]]
    told = [record.getMessage() for record in caplog.records]
    assert [message.partition(", the header 3;")[0] for message in told] == [
        f"{path}: line 5 has 2 fields", f"{path}: line 6 has 4 fields",
    ]  # fmt: skip


def test_half_a_character_in_json_is_replaced_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(
        '{"url": "u1", "caption": "a whole one \\ud83d\\ude00"}\n'
        '{"url": "u2", "caption": "a nice caption \\ud83d"}\n{"url": "u3", "caption": ["\\udc00", 1]}\n'
    )
    assert [row["caption"] for row in read(path)] == [
        "a whole one \U0001f600",
        "a nice caption \ufffd",
        '["\ufffd", 1]',
    ]
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith(f"{path}: 2 values hold half a character or bytes that are no UTF-8 (the first in line 2)")


@pytest.mark.parametrize("name", ["r.txt", "r.txt.gz"])
def test_a_text_file_is_urls_without_captions(tmp_path: Path, name: str) -> None:
    rows = read(write(tmp_path / name, ROWS))
    assert rows == [{"url": row["url"], "caption": ""} for row in ROWS]


def test_columns_are_found_by_name_chosen_and_renamed(tmp_path: Path) -> None:
    path = write(tmp_path / "r.parquet", [{"id": 7, "alt": "a cat", "src": "http://a.example/1", "x": 1.5}])
    assert read(path, Columns("src", "alt", ("x",))) == [{"url": "http://a.example/1", "caption": "a cat", "x": 1.5}]


def test_globs_and_folders_are_read_in_order_of_name_and_on_any_filesystem(tmp_path: Path) -> None:
    for number, row in enumerate(ROWS):
        write(tmp_path / f"part-{number}.csv", [row])
    (tmp_path / "README.md").write_text("not rows")
    assert read(tmp_path / "*.csv") == ROWS
    assert read(tmp_path) == ROWS
    assert read(f"file://{tmp_path}/part-?.csv") == ROWS


def test_an_empty_file_among_others_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "part-0.csv").write_bytes(b"")
    write(tmp_path / "part-1.csv", ROWS)
    assert read(tmp_path / "*.csv") == ROWS


def broken(tmp_path: Path, name: str, content: bytes | None) -> str:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.parquet", None, "no such file"),
        ("none-*.parquet", None, "no file matches"),
        ("rows.xlsx", b"x", "unknown kind"),
        ("empty.csv", b"", "empty"),
        ("headers.csv", b"url,caption\n", "empty"),
        ("empty.parquet", b"", "empty"),
        ("empty.jsonl", b"\n\n", "empty"),
        ("broken.parquet", b"PAR1" + bytes(100), "cannot be read as parquet"),
        ("broken.csv.gz", b"not gzip at all", "cannot be read as csv"),
        ("ragged.csv", b"url,caption\na,b\nc,d,e\n", "cannot be read as csv"),
        ("twice.csv", b"url,caption,url\na,b,c\n", "same name"),
        ("latin.csv", "url,caption\nhttp://a/1,caf\xe9\n".encode("latin-1"), "cannot be read as csv"),
        ("rows.jsonl", b'{"url": "a", "caption": "b"}\n{"url": \n', "line 2 is not JSON"),
        ("list.jsonl", b"[1]\n", "line 1 is not a JSON object"),
        ("deep.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("half.jsonl", b'{"url": "a", "caption": "b", "\\ud83d": 1}\n', r"'\ud83d' holds half a character"),
        ("twice.tsv", b"url\tcaption\turl\na\tb\tc\n", "same name"),
        ("latin.tsv", "url\tcaption\nhttp://a/1\tcaf\xe9\n".encode("latin-1"), "save it as UTF-8"),
        ("headers.tsv", b"url\tcaption\n", "empty"),
        ("late.jsonl", b'{"url": "a", "caption": "b"}\n' * 16_384 + b'{"url": "c", "new": 1}\n', "'new'"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    assert says in broken(tmp_path, name, content)


@pytest.mark.parametrize("name", ["r.parquet", "r.csv", "r.tsv", "r.jsonl"])
def test_a_missing_column_lists_what_there_is_and_the_nearest(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, [{"url": "http://a.example/1", "captions": "a"}])
    with pytest.raises(UserError, match=r"no column 'caption'; it has url, captions \(did you mean 'captions'"):
        read(path)


def test_a_column_of_numbers_is_no_caption(tmp_path: Path) -> None:
    path = write(tmp_path / "r.parquet", [{"url": "http://a.example/1", "caption": 3}])
    with pytest.raises(UserError, match="column 'caption' holds int64, not text"):
        read(path)


def test_files_with_other_columns_do_not_mix(tmp_path: Path) -> None:
    write(tmp_path / "1.csv", [{"url": "a", "caption": "b", "x": "c"}])
    write(tmp_path / "2.csv", [{"url": "a", "caption": "b", "y": "c"}])
    with pytest.raises(UserError, match="--columns"):
        read(tmp_path / "*.csv")
    assert len(read(tmp_path / "*.csv", Columns("url", "caption", ()))) == 2


def test_a_large_parquet_file_is_read_as_a_stream(tmp_path: Path) -> None:
    """Memory does not follow the file: pyarrow would keep what it reads ahead until the end."""
    captions = pa.array([os.urandom(500).hex() for _ in range(1000)])
    table = pa.table({"url": [f"http://a.example/{row}.jpg" for row in range(1000)], "caption": captions})
    groups, rows, held = 60, 0, 0
    with pq.ParquetWriter(tmp_path / "r.parquet", table.schema, use_dictionary=False) as writer:
        for _ in range(groups):
            writer.write_table(table)
    size = (tmp_path / "r.parquet").stat().st_size
    before = pa.total_allocated_bytes()
    for batch in read_rows(find_sources(str(tmp_path / "r.parquet")), COLUMNS):
        rows += batch.num_rows
        held = max(held, pa.total_allocated_bytes() - before)
    assert rows == groups * 1000
    assert held < size / 3
