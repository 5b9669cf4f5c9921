"""Repack: kept samples in even shards, the same bytes however often it is interrupted."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import webdataset as wds

import shards
from infra.cluster import ClusterConfig
from infra.errors import RunError, UserError
from infra.lock import exclusive
from infra.storage import Folder
from shards import index, reads
from shards.layout import FINAL, RAW, STATS_SUFFIX, sample_key
from shards.manifest import Manifest
from shards.order import Order
from shards.reads import Reader
from shards.repack import RepackConfig, repack
from shards.repacker import _RawShards
from shards.repair import repair
from shards.stream import ShardStream
from shards.verify import verify
from tests.shards.conftest import jpeg

ROOT = Path(__file__).parents[2]
MakeCorpus = Callable[..., Folder]
ROWS = [60, 45, 1, 90]
REMOVED = [(sample_key(0, 0), "exact"), (sample_key(3, 89), "exact"), (sample_key(1, 2), "perceptual")]
CONFIG = RepackConfig(samples_per_shard=40, seed=3)
MANY = RepackConfig(samples_per_shard=4, seed=3)
SUCCESSES = 48 + 36 + 1 + 72


def digests(folder: Folder) -> dict[str, str]:
    return {name: hashlib.sha256(folder.read(name)).hexdigest() for name in folder.names()}


@pytest.fixture
def corpus(tmp_path: Path, deduplicated_corpus: MakeCorpus) -> Folder:
    return deduplicated_corpus(str(tmp_path / "corpus"), ROWS, REMOVED)


def test_kept_samples_in_even_shards(corpus: Folder, local_ray: ClusterConfig) -> None:
    raw = {sample["__key__"]: sample for sample in samples_of(corpus / RAW)}
    before = digests(corpus / RAW)
    totals = repack(corpus.url, CONFIG, local_ray)
    kept = SUCCESSES - len(REMOVED)
    assert totals | {"bytes": 0} == {
        "rows_in": SUCCESSES, "by_status": {"success": kept, "filtered": 3},
        "by_reason": {"duplicate_exact": 2, "duplicate_perceptual": 1},
        "shards": 4, "samples": kept, "bytes": 0,
    }  # fmt: skip
    final = corpus / FINAL
    sizes = [final.read_json(name)["successes"] for name in final.names(STATS_SUFFIX)]
    assert sum(sizes) == kept
    assert max(sizes) - min(sizes) <= 1
    assert verify(final).faults == []
    rows = {
        row["key"]: row
        for name in final.names(".parquet")
        if name != "index.parquet"
        for row in pq.read_table(io.BytesIO(final.read(name))).to_pylist()
    }
    sources = [row["source_key"] for row in rows.values()]
    assert sorted(sources) == sorted(raw.keys() - {key for key, _ in REMOVED})
    assert sources != sorted(sources)
    assert {row["key"] for row in rows.values()} == {
        sample_key(shard, row) for shard, size in enumerate(sizes) for row in range(size)
    }
    for sample in samples_of(final):
        row = rows[sample["__key__"]]
        assert sample["jpg"] == raw[row["source_key"]]["jpg"]
        assert sample["txt"] == raw[row["source_key"]]["txt"] == row["caption"].encode()
        assert row["similarity"] == int(row["source_key"][-4:]) / 7
    assert digests(corpus / RAW) == before
    assert repack(corpus.url, CONFIG, local_ray) == totals == Manifest.existing(corpus).totals(FINAL)


def samples_of(folder: Folder) -> Iterator[dict[str, Any]]:
    """Every sample, by a plain webdataset pipeline."""
    tars = [folder.path(name) for name in folder.names(".tar")]
    yield from wds.DataPipeline(wds.SimpleShardList(tars), wds.tarfile_to_samples())


def test_a_plain_webdataset_pipeline_and_the_stream_read_the_same(corpus: Folder, local_ray: ClusterConfig) -> None:
    repack(corpus.url, CONFIG, local_ray)
    plain = {sample["__key__"]: sample["jpg"] for sample in samples_of(corpus / FINAL)}
    stream = ShardStream(corpus / FINAL, global_batch_size=1)
    assert {sample["__key__"]: sample["jpg"] for sample in stream.samples()} == plain


def test_the_same_bytes_from_the_same_samples(
    corpus: Folder, tmp_path: Path, deduplicated_corpus: MakeCorpus, local_ray: ClusterConfig
) -> None:
    other = deduplicated_corpus(str(tmp_path / "other"), ROWS, REMOVED)
    repack(corpus.url, CONFIG, local_ray)
    repack(other.url, CONFIG, local_ray)
    assert digests(corpus / FINAL) == digests(other / FINAL)
    third = deduplicated_corpus(str(tmp_path / "third"), ROWS, REMOVED)
    repack(third.url, RepackConfig(samples_per_shard=40, seed=4), local_ray)
    assert digests(third / FINAL) != digests(corpus / FINAL)


def test_only_what_is_missing_is_done_again(corpus: Folder, local_ray: ClusterConfig) -> None:
    repack(corpus.url, CONFIG, local_ray)
    final = corpus / FINAL
    before = digests(final)
    Manifest.existing(corpus).reopen(FINAL)
    final.delete("00001" + STATS_SUFFIX)
    final.write("00001.tar", b"torn")
    untouched = Path(final.path("00000.tar")).stat().st_mtime_ns
    repack(corpus.url, CONFIG, local_ray)
    assert digests(final) == before
    assert Path(final.path("00000.tar")).stat().st_mtime_ns == untouched


def test_a_shard_that_has_gone_is_noticed_and_made_again(corpus: Folder, local_ray: ClusterConfig) -> None:
    totals = repack(corpus.url, CONFIG, local_ray)
    final = corpus / FINAL
    before = digests(final)
    final.delete("00001" + STATS_SUFFIX)
    assert repack(corpus.url, CONFIG, local_ray) == totals
    assert digests(final) == before
    final.delete("index.parquet")
    assert repack(corpus.url, CONFIG, local_ray) == totals
    assert digests(final) == before


def test_a_damaged_shard_is_dropped_and_made_again(corpus: Folder, local_ray: ClusterConfig) -> None:
    totals = repack(corpus.url, CONFIG, local_ray)
    final = corpus / FINAL
    before = digests(final)
    Path(final.path("00002.tar")).write_bytes(final.read("00002.tar")[:-700])
    assert any("`pairmill repack" in line for line in repair(verify(final)))
    assert not final.exists("00002.tar")
    assert verify(final).faults == []
    manifest = Manifest.existing(corpus)
    assert not manifest.is_done(FINAL)
    assert manifest.totals(FINAL) == {}
    assert repack(corpus.url, CONFIG, local_ray) == totals
    assert digests(final) == before


def test_nothing_is_repacked_from_less_than_was_ingested(corpus: Folder, local_ray: ClusterConfig) -> None:
    repack(corpus.url, CONFIG, local_ray)
    before = digests(corpus / FINAL)
    for lost in (RAW, FINAL):
        (corpus / lost).delete("00001" + STATS_SUFFIX)
    with pytest.raises(RunError, match="1 of 4 shards have gone; `pairmill ingest` makes them again"):
        repack(corpus.url, CONFIG, local_ray)
    assert before.items() > digests(corpus / FINAL).items()


def test_numbers_beyond_five_digits_keep_their_order(
    tmp_path: Path, deduplicated_corpus: MakeCorpus, local_ray: ClusterConfig
) -> None:
    removed = [(sample_key(99_999, 2), "exact"), (sample_key(100_000, 3), "exact")]
    corpus = deduplicated_corpus(str(tmp_path / "corpus"), [7, 9, 8], removed, first=99_998)
    raw = corpus / RAW
    built = index.build(raw)
    assert [shard.name for shard in built.shards] == ["99998", "99999", "100000"]
    index.save(raw, built)
    assert verify(raw).faults == []
    samples = shards.open(raw.url)
    assert samples.number("1000000000") == built.shards[2].first_sample
    keys = [sample["__key__"] for sample in samples]
    assert keys == sorted(keys, key=int) != sorted(keys)
    totals = repack(corpus.url, CONFIG, local_ray)
    assert totals["by_reason"] == {"duplicate_exact": 2}
    sidecar = pq.read_table(io.BytesIO((corpus / FINAL).read("00000.parquet")))
    assert sorted(map(int, sidecar["source_key"].to_pylist())) == sorted({*map(int, keys)} - {999990002, 1000000003})


def test_the_users_mistakes(
    corpus: Folder, tmp_path: Path, deduplicated_corpus: MakeCorpus, local_ray: ClusterConfig
) -> None:
    with pytest.raises(UserError, match="no corpus here"):
        repack(str(tmp_path / "nowhere"), CONFIG, local_ray)
    with exclusive(corpus), pytest.raises(UserError, match="already working on this folder"):
        repack(corpus.url, CONFIG, local_ray)
    repack(corpus.url, CONFIG, local_ray)
    with pytest.raises(UserError, match="samples_per_shard: 40 there, 50 now"):
        repack(corpus.url, RepackConfig(samples_per_shard=50, seed=3), local_ray)
    stranger = deduplicated_corpus(str(tmp_path / "stranger"), [5], [(sample_key(7, 7), "exact")])
    with pytest.raises(RunError, match="removed 1 keys, 0 of them"):
        repack(stranger.url, CONFIG, local_ray)


def test_a_damaged_raw_shard_is_named(corpus: Folder, local_ray: ClusterConfig) -> None:
    path = Path(corpus.path("raw/00001.tar"))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(RunError, match=r"raw/00001\.tar: this shard has 5000 bytes"):
        repack(corpus.url, CONFIG, local_ray)


def test_all_removed_leaves_an_empty_index(
    tmp_path: Path, deduplicated_corpus: MakeCorpus, local_ray: ClusterConfig
) -> None:
    corpus = deduplicated_corpus(str(tmp_path / "empty"), [1], [(sample_key(0, 0), "exact")])
    totals = repack(corpus.url, CONFIG, local_ray)
    assert (totals["shards"], totals["samples"], totals["rows_in"]) == (0, 0, 1)
    assert verify(corpus / FINAL).faults == []


def test_what_dedup_removed_is_neither_read_nor_held(
    tmp_path: Path, deduplicated_corpus: MakeCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = (0, 2, 150, 239)  # of 240 successes in 300 rows
    successes = [sample_key(0, row) for row in range(300) if row % 5 != 1]
    removed = [(key, "exact") for number, key in enumerate(successes) if number not in kept]
    raw = _RawShards(deduplicated_corpus(str(tmp_path / "sparse"), [300], removed))
    monkeypatch.setattr(reads, "LARGEST_GAP_BYTES", 30_000)
    pieces = []
    read = Reader.read
    monkeypatch.setattr(Reader, "read", lambda *given: pieces.append(read(*given)) or pieces[-1])
    found = raw.samples("00000", 0, 4, 4)
    assert [(row["key"], row["member"], extension) for row, _, extension in found] == [
        (successes[number], f"{successes[number]}.jpg", "jpg") for number in kept
    ]
    assert [body for _, body, _ in found] == [jpeg(int(successes[number])) for number in kept]
    ((first, *others),) = pieces
    assert ([len(first.ends)], [len(piece.ends) for piece in others]) == ([3], [1, 1])
    held = sum(len(piece.data) for piece in (first, *others))
    assert held < 5 * Path(raw.folder.path("00000.tar")).stat().st_size / 240
    assert len(raw.samples("00000", 1, 3, 4)) == 2
    with pytest.raises(RunError, match="changed while repack"):
        raw.samples("00000", 0, 3, 5)


def test_order_of_the_samples_needs_no_more_memory_than_a_window() -> None:
    order = Order(400_000_000, 1, 1, 256, 8)
    held: dict[int, int] = {}
    for step in order.walk(0, 123_450_000, 123_470_000):
        held[int(step.run[0])] = int(step.until[0])
        held = {run: until for run, until in held.items() if until >= step.step}
        assert len(held) <= 9


@contextmanager
def started(corpus: Folder) -> Iterator[subprocess.Popen[bytes]]:
    """A repack in its own process with its own Ray; whatever is left of both is ended with the block."""
    script = (
        "import sys\nfrom infra.cluster import ClusterConfig\nfrom shards.repack import RepackConfig, repack\n"
        f"repack(sys.argv[1], RepackConfig(samples_per_shard={MANY.samples_per_shard}, seed={MANY.seed}), "
        "ClusterConfig(cpus=1, object_store_bytes=80 * 2**20))\n"
    )
    command = [sys.executable, "-c", script, corpus.url]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    family: dict[int, psutil.Process] = {}
    try:
        yield process
    finally:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                family[child.pid] = child
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        for child in family.values():
            if child.is_running():
                child.kill()


def test_killed_and_started_again_it_leaves_the_same_bytes(
    corpus: Folder, tmp_path: Path, deduplicated_corpus: MakeCorpus, local_ray: ClusterConfig
) -> None:
    undisturbed = deduplicated_corpus(str(tmp_path / "undisturbed"), ROWS, REMOVED)
    repack(undisturbed.url, MANY, local_ray)
    final = corpus / FINAL
    with started(corpus) as process:
        while not final.names(STATS_SUFFIX) and process.poll() is None:
            time.sleep(0.02)
    assert not Manifest.existing(corpus).is_done(FINAL)
    assert 1 <= len(final.names(STATS_SUFFIX)) < 39
    totals = repack(corpus.url, MANY, local_ray)
    assert totals == Manifest.existing(undisturbed).totals(FINAL)
    assert digests(final) == digests(undisturbed / FINAL)
    assert verify(final).faults == []
