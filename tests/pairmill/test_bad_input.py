"""What a user does wrong, and what the machine has no room for: one line that says what, where and how to mend it."""

from __future__ import annotations

import gzip
import json
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.layout import DEDUP, FINAL, RAW
from tests.mounts import needs_mount

pytestmark = pytest.mark.xdist_group("made corpus")

Mistake = Callable[..., str]
Run = Callable[..., subprocess.CompletedProcess[str]]
Begin = Callable[..., Any]
Recipe = Callable[..., Path]
Undo = Callable[..., None]
ROWS = {"url": [f"http://127.0.0.1:9/{n}.jpg" for n in range(3000)], "caption": [f"picture {n}" for n in range(3000)]}
CSV = b"url,caption\n" + b"".join(b"http://127.0.0.1:9/%d.jpg,picture %d\n" % (n, 7919 * n) for n in range(3000))


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(ROWS), sink)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    (tmp_path / "rows.csv").write_bytes(CSV)
    return tmp_path / "rows.csv"


@pytest.fixture
def photos(tmp_path: Path) -> Iterator[Path]:
    """A folder that holds something else, and still does so unchanged when the test is over."""
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "holiday.jpg").write_bytes(b"x")
    yield folder
    assert [path.name for path in folder.iterdir()] == ["holiday.jpg"]
    assert (folder / "holiday.jpg").read_bytes() == b"x"


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("cut.parquet", cut(parquet()), "cannot be read as parquet"),
        ("latin1.csv", b"url,caption\nhttp://a.example/1.jpg,caf\xe9 at night\n", "save it as UTF-8"),
        ("cut.csv.gz", cut(gzip.compress(CSV, mtime=0)), "mend it, or get it anew"),
        ("ragged.csv", CSV + b"http://a.example/1.jpg,one, two\n", "Expected 2 columns, got 3"),
        ("broken.jsonl", b'{"url": "http://a.example/1.jpg", "caption": "one"}\n{"url"\n', "line 2 is not JSON"),
        ("header.csv", b"url,caption\n", "there are no rows"),
        ("folder.parquet", None, "no file of rows in this folder"),
        ("rows.xlsx", b"PK", "unknown kind of file"),
    ],
)
def test_rows_that_cannot_be_read(tmp_path: Path, mistake: Mistake, name: str, data: bytes | None, words: str) -> None:
    path = tmp_path / name
    path.mkdir() if data is None else path.write_bytes(data)
    line = mistake("plan", tmp_path / "corpus", "--urls", path)
    assert words in line
    assert str(path) in line
    assert not (tmp_path / "corpus").exists()


def test_a_pattern_that_no_file_matches(tmp_path: Path, mistake: Mistake) -> None:
    assert "*.parquet: no file matches" in mistake("plan", tmp_path / "corpus", "--urls", tmp_path / "*.parquet")


def test_a_storage_out_of_reach(tmp_path: Path, mistake: Mistake, pairmill: Run) -> None:
    url = "http://127.0.0.1:9/rows.csv"
    assert f"{url}: cannot be reached" in mistake("plan", tmp_path / "corpus", "--urls", url)
    nameless = ("env", "-u", "AWS_ACCESS_KEY_ID", "-u", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED=true")
    done = pairmill("status", "s3://no-bucket-of-ours/corpus", prefix=nameless)
    assert done.returncode == 1
    assert done.stderr.startswith("pairmill: the storage failed: NoCredentialsError")
    assert done.stderr.count("\n") == 1


def test_a_training_recipe_with_an_unknown_key_or_option(recipe: Recipe, mistake: Mistake) -> None:
    line = mistake("train", recipe(more="[evaluate]\nsuit = 'x'\n"))
    assert "run.toml: unknown key 'evaluate.suit' (did you mean 'suite'?)" in line
    assert "--nproc" in mistake("train", recipe(), "--nprocs", "2")
    assert "nproc: 0 processes; start at least 1" in mistake("train", recipe(), "--nproc", "0")
    assert "checkpoint.folder" in mistake("train", recipe(), "--run", "s3://bucket/run")


def test_a_folder_that_holds_something_else(photos: Path, rows: Path, mistake: Mistake, recipe: Recipe) -> None:
    assert "holiday.jpg" in mistake("plan", photos, "--urls", rows)
    assert "something other than a quickstart" in mistake("quickstart", "--out", photos)
    assert "no training run" in mistake("train", recipe(), "--run", photos)
    assert "no corpus here" in mistake("ingest", photos)


def test_a_file_in_place_of_a_folder(photos: Path, rows: Path, mistake: Mistake, recipe: Recipe) -> None:
    file = photos / "holiday.jpg"
    assert "holiday.jpg" in mistake("plan", file, "--urls", rows)
    assert "no folder" in mistake("plan", file / "corpus", "--urls", rows)
    assert "no folder" in mistake("quickstart", "--out", file / "out")
    assert "no folder" in mistake("train", recipe(), "--run", file / "run")


@pytest.mark.parametrize(
    ("command", "options", "difference"),
    [
        ("plan", ("--rows-per-shard", "7"), "rows_per_shard: 10 there, 7 now"),
        ("ingest", ("--image.size", "64"), "image.size: 32 there, 64 now"),
        ("dedup", ("--distance", "3"), "distance: 31 there, 3 now"),
        ("repack", ("--seed", "5"), "seed: 0 there, 5 now"),
    ],
)
def test_a_corpus_made_with_another_configuration(
    finished: Path, mistake: Mistake, command: str, options: tuple[str, str], difference: str
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != ".lock"}
    line = mistake(command, finished, "--config", finished.parent / "corpus.toml", *options)
    assert f"made with another configuration ({difference})" in line
    assert "use the same, or a new corpus folder" in line
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != ".lock"}


def test_a_run_of_another_configuration(tmp_path: Path, recipe: Recipe, pairmill: Run, mistake: Mistake) -> None:
    done = pairmill("train", recipe(length="2 steps"))
    assert done.returncode == 0, done.stderr
    line = mistake("train", recipe(length="3 steps"))
    assert "another configuration (length: '2 steps' there, '3 steps' now)" in line
    assert "take a new folder" in line
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 2


def test_a_port_that_is_taken(tmp_path: Path, mistake: Mistake) -> None:
    with socket.socket() as one, socket.socket() as other:
        for taken in (one, other):
            taken.bind(("127.0.0.1", 0))
            taken.listen()
        # Each time the port just given is the one complained of: the first attempt has bound nobody to anything.
        for port in (one.getsockname()[1], other.getsockname()[1]):
            line = mistake("quickstart", "--out", tmp_path / "out", "--port", str(port))
            assert f"cannot listen on 127.0.0.1:{port}" in line
            assert "choose another --port" in line
    assert "0 (any that is free) to 65535" in mistake("quickstart", "--out", tmp_path / "out", "--port", "65536")


def test_two_on_one_corpus(finished: Path, undo: Undo, begin: Begin, mistake: Mistake) -> None:
    toml = finished.parent / "corpus.toml"
    undo(finished, RAW, DEDUP, FINAL)
    first = begin("ingest", finished, "--config", finished.parent / "slow.toml")
    first.has_locked(finished)
    for command in ("ingest", "dedup", "repack"):
        line = mistake(command, finished, "--config", toml)
        assert f"process {first.process.pid} on" in line
        assert "already working on this folder; wait for it to end, or stop it" in line
    first.kill()
    assert "'raw' is not finished yet" in mistake("dedup", finished)


def test_two_quickstarts_in_one_folder(tmp_path: Path, begin: Begin, mistake: Mistake) -> None:
    first = begin("quickstart", "--out", tmp_path / "out", "--port", "0")
    first.has_locked(tmp_path / "out")
    assert f"process {first.process.pid} on" in mistake("quickstart", "--out", tmp_path / "out")
    first.kill()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        line = mistake("quickstart", "--out", tmp_path / "out", "--port", str(taken.getsockname()[1]))
    assert "already working" not in line


def test_two_on_one_training_run(tmp_path: Path, recipe: Recipe, begin: Begin, mistake: Mistake) -> None:
    first = begin("train", recipe(length="100000 steps"))
    first.has_locked(tmp_path / "run")
    assert f"process {first.process.pid} on" in mistake("train", recipe(length="100000 steps"))
    told = tmp_path / "run" / "log.jsonl"  # before a step is told of, the configuration binds nobody
    first.wait_until(lambda: told.exists() and told.stat().st_size)
    first.kill()
    assert "another configuration" in mistake("train", recipe(length="7 steps"))


def on_small_disk(disk: Path, first: Path) -> tuple[str, ...]:
    """Put before a command: it runs on a disk of 200 KB, then again on one that is large enough.

    In a mount namespace of its own. `first` gets the first one's standard error, its exit code as the last line, and
    what it left on the disk under a temporary name.
    """
    script = (
        f"mount -t tmpfs -o size=200k tmpfs {disk} || exit 9; "
        f'"$@" 2> {first} > {first}.out; echo $? >> {first}; find {disk} -name ".tmp-*" >> {first}; '
        f'mount -o remount,size=99m {disk} && "$@" && cp -r {disk} {disk}.kept'
    )
    return ("unshare", "-rm", "sh", "-c", script, "sh")


@needs_mount
@pytest.mark.slow
def test_a_disk_too_small_for_a_checkpoint(tmp_path: Path, recipe: Recipe, pairmill: Run) -> None:
    disk, said = tmp_path / "disk", tmp_path / "first"
    disk.mkdir()
    done = pairmill("train", recipe(), "--run", disk / "run", "--json", prefix=on_small_disk(disk, said))
    *lines, last, code = said.read_text().splitlines()
    assert code == "1"
    assert "step-00000004: the disk is full; free some space and run the same command again" in last
    assert not [line for line in lines if "INFO" not in line]
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 12


@needs_mount
@pytest.mark.slow
def test_a_disk_too_small_for_the_final_shards(tmp_path: Path, finished: Path, undo: Undo, pairmill: Run) -> None:
    expected = {path.name: path.read_bytes() for path in (finished / FINAL).glob("*.tar")}
    undo(finished, FINAL)
    disk, said = finished / FINAL, tmp_path / "first"
    disk.mkdir()
    options = ("--config", tmp_path / "corpus.toml")
    done = pairmill("repack", finished, *options, prefix=on_small_disk(disk, said))
    *lines, last, code = said.read_text().splitlines()
    assert code == "1"
    assert "the disk is full; free some space and run the same command again" in last
    assert not [line for line in lines if "INFO" not in line]
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in Path(f"{disk}.kept").glob("*.tar")} == expected


def test_a_bound_on_the_size_of_files(tmp_path: Path, rows: Path, pairmill: Run, mistake: Mistake) -> None:
    """What the shell's `ulimit -f` does; the same command without it goes on."""
    arguments = ("plan", tmp_path / "corpus", "--urls", rows)
    done = pairmill(*arguments, prefix=("bash", "-c", 'ulimit -f 8; exec "$@"', "bash"))
    assert done.returncode == 1, done.stderr
    assert "no file may grow this large here (see `ulimit -f`); raise that bound" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert pairmill(*arguments).returncode == 0
