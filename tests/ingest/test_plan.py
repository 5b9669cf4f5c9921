"""The plan accounts for every row, merges equal URLs, and is the same to the byte whenever it is made."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from w3lib.url import canonicalize_url
from yarl import URL

from infra.errors import UserError
from infra.lock import exclusive
from infra.storage import Folder
from ingest.config import PlanConfig
from ingest.plan import plan
from ingest.retry import EARLIER_REASON, EARLIER_STATUS
from ingest.spill import ORDER, SortedRuns
from ingest.urls import canonical, host_of

ROWS = [
    {
        "url": f"http://host{number % 7}.example/{number}.jpg",
        "caption": f"a picture of thing {number}",
        "n": number,
    }
    for number in range(1000)
]
ODD = [
    {"url": "http://host1.example/1.jpg#again", "caption": "the first one, under another URL", "n": -1},
    {"url": "HTTP://Host1.example/1.jpg", "caption": "and once more in capitals", "n": -2},
    {"url": "ftp://host1.example/1.jpg", "caption": "not the web", "n": -3},
    {"url": None, "caption": "no URL at all", "n": -4},
    {"url": "http:///nothing.jpg", "caption": "no host in it", "n": -5},
    {"url": "http://host2.example/x.jpg", "caption": None, "n": -6},
    {"url": "http://host2.example/y.jpg", "caption": "IMG_0001.jpg", "n": -7},
    {"url": "http://host2.example/2.jpg", "caption": "click to enlarge", "n": -8},
]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([*ROWS, *ODD]), path)
    return path


def parts(corpus: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((corpus / "plan").iterdir())}


def planned(corpus: Path) -> list[dict[str, Any]]:
    paths = sorted((corpus / "plan").glob("part-*.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def test_every_row_is_planned_or_rejected_with_its_reason(tmp_path: Path, rows: Path) -> None:
    totals = plan(str(tmp_path / "c"), PlanConfig(urls=str(rows), rows_per_shard=300))
    assert totals["by_reason"] == {
        "bad_url": 3, "caption_boilerplate": 1, "caption_empty": 1, "caption_file_name": 1, "duplicate_url": 2,
    }  # fmt: skip
    assert totals["rows_in"] == 1008 == sum(totals["by_status"].values())
    assert totals["rows_out"] == 1000 == totals["by_status"]["planned"]
    assert (totals["parts"], totals["hosts"]) == (4, 7)
    rejected = pq.read_table(tmp_path / "c" / "plan" / "rejected-00000.parquet").to_pylist()
    assert Counter(row["reason"] for row in rejected) == totals["by_reason"]
    assert {row["n"] for row in rejected} == set(range(-8, 0))
    kept = planned(tmp_path / "c")
    assert sorted(row["row"] for row in kept) == list(range(1000))
    assert all(row["url"] == ROWS[row["row"]]["url"] and row["n"] == row["row"] for row in kept)
    assert [row["key"] for row in kept[298:302]] == ["000000298", "000000299", "000010000", "000010001"]


def test_the_order_is_shuffled_by_the_seed_and_spreads_hosts(tmp_path: Path, rows: Path) -> None:
    orders = []
    for seed in (0, 1):
        corpus = tmp_path / f"c{seed}"
        plan(str(corpus), PlanConfig(urls=str(rows), rows_per_shard=250, seed=seed))
        orders.append([row["row"] for row in planned(corpus)])
        for path in (corpus / "plan").glob("part-*.parquet"):
            hosts = Counter(host_of(url) for url in pq.read_table(path)["url"].to_pylist())
            assert len(hosts) == 7
            assert max(hosts.values()) < 70
    assert orders[0] != orders[1]
    assert abs(np.corrcoef(orders[0], range(1000))[0, 1]) < 0.15


def test_the_same_rows_give_the_same_bytes_however_they_are_sorted(tmp_path: Path, rows: Path) -> None:
    for name, at_once in (("a", 10**6), ("b", 10**6), ("c", 97)):
        plan(str(tmp_path / name), PlanConfig(urls=str(rows), rows_per_shard=300, sort_rows=at_once))
    assert parts(tmp_path / "a") == parts(tmp_path / "b")
    kept = {name: data for name, data in parts(tmp_path / "a").items() if name.startswith("part-")}
    assert kept.items() <= parts(tmp_path / "c").items()
    assert planned(tmp_path / "a") == planned(tmp_path / "c")


def test_a_finished_plan_is_left_as_it_is_and_not_mixed_with_another(tmp_path: Path, rows: Path) -> None:
    corpus = str(tmp_path / "c")
    config = PlanConfig(urls=str(rows), rows_per_shard=300)
    totals = plan(corpus, config)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "c" / "plan").iterdir()}
    rows.unlink()
    assert plan(corpus, config) == totals
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "c" / "plan").iterdir()}
    with pytest.raises(UserError, match="rows_per_shard: 300 there, 200 now"):
        plan(corpus, config.model_copy(update={"rows_per_shard": 200}))


def test_a_mistyped_column_leaves_no_corpus_behind(tmp_path: Path, rows: Path) -> None:
    with pytest.raises(UserError, match="no column 'captoin'"):
        plan(str(tmp_path / "c"), PlanConfig(urls=str(rows), caption_col="captoin"))
    assert not (tmp_path / "c").exists()


def test_rows_that_turn_out_unreadable_leave_the_folder_free_for_others(tmp_path: Path) -> None:
    (tmp_path / "1.csv").write_text("url,caption\nhttp://a.example/1,a good one\n")
    (tmp_path / "2.csv").write_text("url,text\nhttp://a.example/2,a bad one\n")
    corpus = str(tmp_path / "c")
    with pytest.raises(UserError, match=r"2\.csv: no column 'caption'"):
        plan(corpus, PlanConfig(urls=f"{tmp_path}/*.csv"))
    assert plan(corpus, PlanConfig(urls=f"{tmp_path}/1.csv"))["rows_out"] == 1


def test_columns_that_the_sidecar_needs_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"url": ["http://a.example/1"], "caption": ["a good one"], "width": [3]}), path)
    with pytest.raises(UserError, match=r"column 'width'.*rename it in the input, or name the columns .* --columns"):
        plan(str(tmp_path / "c"), PlanConfig(urls=str(path)))
    assert plan(str(tmp_path / "d"), PlanConfig(urls=str(path), columns=()))["rows_out"] == 1


@pytest.mark.parametrize(
    "name", ["row", "source_key", "key", "status", "reason", *ORDER, EARLIER_STATUS, EARLIER_REASON]
)
def test_a_column_of_ours_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"url": ["http://a.example/1"], "caption": ["a good one"], name: [3]}), path)
    with pytest.raises(UserError, match=f"column '{name}' of the input has a name that the corpus needs"):
        plan(str(tmp_path / "c"), PlanConfig(urls=str(path)))
    assert not (tmp_path / "c").exists()


def test_any_other_column_passes_through(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    columns = {"high": [1, 2, 3], "low": ["a", "b", "c"], "rank": [0.5, None, float("nan")], "Row": [7, 8, 9]}
    urls = ["http://a.example/1", "http://a.example/1#again", "http://b.example/2"]
    pq.write_table(pa.table({"url": urls, "caption": ["a good one"] * 3, **columns}), path)
    totals = plan(str(tmp_path / "c"), PlanConfig(urls=str(path)))
    assert (totals["rows_out"], totals["by_reason"]) == (2, {"duplicate_url": 1})
    kept = {row["row"]: (row["high"], row["low"], row["Row"]) for row in planned(tmp_path / "c")}
    assert kept == {0: (1, "a", 7), 2: (3, "c", 9)}
    (rejected,) = pq.read_table(tmp_path / "c" / "plan" / "rejected-00000.parquet").to_pylist()
    assert (rejected["high"], rejected["low"], rejected["row"]) == (2, "b", 1)


def test_rows_that_no_file_could_hold_or_tell_apart_are_accounted_for(tmp_path: Path) -> None:
    """A stray quote in a TSV takes no other row with it, a ragged line is rejected, half a character is replaced."""
    lines = [
        "url\tcaption",
        'http://a.example/1\t"a stray quote',
        "http://a.example/2\tand a good one",
        "a\tragged\tline",
    ]
    (tmp_path / "1.tsv").write_text("\n".join(lines))
    (tmp_path / "2.jsonl").write_text('{"url": "http://a.example/3", "caption": "a nice caption \\ud83d"}\n')
    for name, rows_in, kept in (
        ("1.tsv", 3, {'"a stray quote', "and a good one"}),
        ("2.jsonl", 1, {"a nice caption \ufffd"}),
    ):
        corpus = tmp_path / name.partition(".")[0]
        totals = plan(str(corpus), PlanConfig(urls=str(tmp_path / name)))
        assert (totals["rows_in"], {row["caption"] for row in planned(corpus)}) == (rows_in, kept)
    (rejected,) = pq.read_table(tmp_path / "1" / "plan" / "rejected-00000.parquet").to_pylist()
    assert (rejected["row"], rejected["caption"], rejected["reason"]) == (2, "a\tragged\tline", "bad_url")


def of_bytes(values: list[bytes | None], kind: pa.DataType) -> pa.Array:
    """A column of text whose bytes nobody has checked."""
    raw = pa.array(values, pa.large_binary() if pa.types.is_large_string(kind) else pa.binary())
    return pa.Array.from_buffers(kind, len(raw), raw.buffers(), raw.null_count)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()], ids=str)
def test_bytes_that_are_no_utf8_are_replaced_and_told(
    tmp_path: Path, kind: pa.DataType, caplog: pytest.LogCaptureFixture
) -> None:
    urls = [b"http://a.example/1.jpg", b"http://a.example/caf\xe9.jpg", b"http://a.example/3.jpg", None]
    captions = [b"a good caption", b"another of them", b"a caf\xe9 in Lyon", b"one with no URL"]
    columns = {"url": urls, "caption": captions, "n": [b"\xff", b"one", None, b"\xed\xa0\x80"]}
    table = pa.table({name: of_bytes(values, kind) for name, values in columns.items()})
    pq.write_table(table, tmp_path / "rows.parquet")
    totals = plan(str(tmp_path / "c"), PlanConfig(urls=str(tmp_path / "rows.parquet")))
    assert (totals["rows_in"], totals["rows_out"], totals["by_reason"]) == (4, 3, {"bad_url": 1})
    kept = {row["row"]: (row["url"], row["caption"], row["n"]) for row in planned(tmp_path / "c")}
    assert kept == {
        0: ("http://a.example/1.jpg", "a good caption", "\ufffd"),
        1: ("http://a.example/caf\ufffd.jpg", "another of them", "one"),
        2: ("http://a.example/3.jpg", "a caf\ufffd in Lyon", None),
    }
    assert "rows.parquet: 4 values hold" in caplog.text
    assert "the first in row 1, column 'url'" in caplog.text


def test_a_nested_column_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    tags = pa.ListArray.from_arrays([0, 1, 2], of_bytes([b"a", b"\xff"], pa.string()))
    table = pa.table({"url": ["http://a.example/1", "http://a.example/2"], "caption": ["a good one"] * 2, "tags": tags})
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"rows\.parquet: column 'tags' holds what cannot be .*--columns"):
        plan(str(tmp_path / "c"), PlanConfig(urls=str(tmp_path / "rows.parquet")))
    assert plan(str(tmp_path / "d"), PlanConfig(urls=str(tmp_path / "rows.parquet"), columns=()))["rows_out"] == 2


def test_a_folder_of_something_else_is_not_written_to(tmp_path: Path, rows: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        plan(str(other), PlanConfig(urls=str(rows)))
    assert [path.name for path in other.iterdir()] == ["thesis.tex"]


def test_a_second_process_says_that_the_first_is_at_work(tmp_path: Path, rows: Path) -> None:
    corpus = Folder(tmp_path / "c")
    with exclusive(corpus), pytest.raises(UserError, match=f"process {os.getpid()} on .* already working"):
        plan(corpus.url, PlanConfig(urls=str(rows)))


def test_a_plan_that_was_killed_is_made_anew_and_the_same(tmp_path: Path) -> None:
    number = 60_000
    table = pa.table({
        "url": [f"http://h{row % 90}.example/{row}.jpg" for row in range(number)],
        "caption": [f"a picture of {row}" for row in range(number)],
    })  # fmt: skip
    pq.write_table(table, tmp_path / "rows.parquet")
    config = PlanConfig(urls=str(tmp_path / "rows.parquet"), rows_per_shard=100)
    plan(str(tmp_path / "whole"), config)
    code = (
        "import sys; from ingest.config import PlanConfig; from ingest.plan import plan;"
        f"plan(sys.argv[1], PlanConfig(urls={config.urls!r}, rows_per_shard=100))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "killed")])
    try:
        while process.poll() is None and not list((tmp_path / "killed" / "plan").glob("part-*")):
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    (tmp_path / "killed" / "plan" / "part-99999.parquet").write_bytes(b"of an earlier, longer list")
    plan(str(tmp_path / "killed"), config)
    assert parts(tmp_path / "killed") == parts(tmp_path / "whole")


URL_TEXT = st.text(st.sampled_from("abcXYZ019-._~/%?&=#+: éü漢"), max_size=40)


@settings(max_examples=300)
@given(
    st.sampled_from(["http://", "https://", "HTTP://", ""]),
    st.sampled_from(["a.b", "A.b:80", "x-1.y"]),
    URL_TEXT,
)
def test_the_short_way_to_a_canonical_url_agrees_with_w3lib(scheme: str, host: str, rest: str) -> None:
    found = canonical(f"{scheme}{host}/{rest}")
    if found is not None:
        assert found == canonicalize_url(f"{scheme}{host}/{rest}".strip())
        assert canonical(found) == found


HOST_TEXT = st.text(st.sampled_from("abz09.-_:/?#@[]% \\AÉ①。\t\n\udce9"), max_size=14)


@settings(max_examples=500)
@given(st.sampled_from(["http://", "https://", "HTTP://"]), HOST_TEXT)
@example("http://", "[]@")
def test_the_short_way_to_a_host_agrees_with_the_http_client(scheme: str, rest: str) -> None:
    host = host_of(scheme + rest)
    assert host is None or host.isascii()
    try:
        asked = URL(scheme + rest).raw_host or ""
    except (ValueError, IndexError):
        assert host is None
        return
    assert host == (asked.rstrip(".") or None) or not asked.isascii() or "\\" in asked


def test_spellings_of_one_host_are_one() -> None:
    spellings = ("bücher.example", "BÜCHER.example.", "xn--bcher-kva.example:80", "user@bücher。example")
    assert {host_of(f"http://{one}/a.jpg") for one in spellings} == {"xn--bcher-kva.example"}


@given(st.text(max_size=60))
@example("\\")
@example("\\a.b/1.jpg")
@example("a.b\\@c.d/1.jpg")
@example("[]@/1.jpg")
def test_any_text_is_a_url_or_is_not(text: str) -> None:
    for candidate in (text, f"http://{text}", f"http://a.b/{text}"):
        found = canonical(candidate)
        assert found is None or host_of(found)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 3)), min_size=1, max_size=30), max_size=6),
    st.integers(1, 50),
)
def test_merged_runs_are_sorted_and_whole(runs: list[list[tuple[int, int]]], at_once: int) -> None:
    sorter = SortedRuns()
    rows = []
    for run in runs:
        numbered = [(high, low, len(rows) + at) for at, (high, low) in enumerate(run)]
        rows += numbered
        high, low, number = zip(*numbered, strict=True)
        sorter.add(pa.table({
            ORDER[0]: pa.array(high, pa.uint64()), ORDER[1]: pa.array(low, pa.uint64()),
            "row": pa.array(number, pa.int64()),
        }))  # fmt: skip
    merged = [tuple(row.values()) for table in sorter.merged(at_once) for row in table.to_pylist()]
    sorter.close()
    assert merged == sorted(rows)
