"""Random access: one ranged read a sample, counted at the server that answers it."""

from __future__ import annotations

import copy
import http.server
import pickle
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

import shards
from infra.storage import Folder
from shards import index

Corpus = Callable[..., Folder]


class RangedFiles(http.server.SimpleHTTPRequestHandler):
    """Serves files and ranges of them; notes every GET as (name, first byte, byte after the last)."""

    root: Path
    reads: list[tuple[str, int, int]]

    def do_GET(self) -> None:
        self._answer(self.reads)

    def do_HEAD(self) -> None:
        self._answer(None)

    def _answer(self, reads: list[tuple[str, int, int]] | None) -> None:
        name = self.path.strip("/")
        path = self.root / name
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, end = (int(asked[1]), int(asked[2]) + 1) if asked else (0, len(data))
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        self.end_headers()
        if reads is not None:
            reads.append((name, start, end))
            self.wfile.write(data[start:end])

    def log_message(self, *_: Any) -> None:
        """Nothing to say."""


@pytest.fixture
def served(shards_of: Corpus) -> Iterator[tuple[str, index.Index, list[tuple[str, int, int]]]]:
    """A folder without gaps over HTTP: its URL, its index, and the reads that were asked for."""
    folder = shards_of(40, 25)
    reads: list[tuple[str, int, int]] = []
    handler = type("Handler", (RangedFiles,), {"root": Path(folder.url), "reads": reads})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}", index.load(folder), reads
        server.shutdown()


def test_a_sample_is_one_ranged_read_by_number_and_by_key(
    served: tuple[str, index.Index, list[tuple[str, int, int]]],
) -> None:
    url, told, reads = served
    samples = shards.open(url)
    assert {name for name, _, _ in reads} == {"index.parquet"}
    for which, shard, row in (
        (0, 0, 0),
        (39, 0, 39),
        (40, 1, 0),
        (-1, 1, 24),
        ("000000017", 0, 17),
        ("000010024", 1, 24),
    ):
        reads.clear()
        sample = samples[which]
        assert sample["__index__"] == told.shards[shard].first_sample + row
        ends = [0, *told.ends(shard).tolist()]
        assert reads == [(f"0000{shard}.tar", ends[row], ends[row + 1])]


def test_where_keys_have_gaps_a_sidecar_is_read_once(own_shards: Folder) -> None:
    samples = shards.open(own_shards.url)
    for number in range(len(samples)):
        key = samples[number]["__key__"]
        assert samples[key]["__index__"] == samples.number(key) == number
    for missing in ("000000001", "000010999", "00003", "7", ""):
        with pytest.raises(KeyError, match="no sample has the key"):
            samples[missing]


def test_samples_travel_and_each_process_reads_for_itself(
    served: tuple[str, index.Index, list[tuple[str, int, int]]],
) -> None:
    url, _, _ = served
    samples = shards.open(url)
    keys = [samples[number]["__key__"] for number in (0, 64)]
    for copied in (copy.deepcopy(samples), pickle.loads(pickle.dumps(samples))):  # noqa: S301
        assert [copied[number]["__key__"] for number in (0, 64)] == keys
    # Forked after reads over connections of this process' own.
    loader = DataLoader(samples, batch_size=None, num_workers=2, multiprocessing_context="fork")  # type: ignore[arg-type]
    assert [sample["__index__"] for sample in loader] == list(range(65))
