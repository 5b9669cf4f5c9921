"""`pairmill index` on folders that other tools wrote: webdataset's own writer, and img2dataset."""

from __future__ import annotations

import functools
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

import shards
from infra.storage import Folder
from shards import index
from shards.layout import INDEX
from shards.scan import file_digest
from shards.stream import ShardStream
from shards.verify import verify

Pairmill = Callable[..., subprocess.CompletedProcess[str]]
IMG2DATASET = """
import sys
from img2dataset import download
if __name__ == "__main__":
    download(url_list=sys.argv[1], output_folder=sys.argv[2], input_format="csv", url_col="url", caption_col="caption",
        output_format="webdataset", processes_count=1, thread_count=2, image_size=32, number_sample_per_shard=2,
        enable_wandb=False, disallowed_header_directives=[])
"""


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A folder of three tars by webdataset's writer."""
    with wds.ShardWriter(str(tmp_path / "part-%03d.tar"), maxcount=8, verbose=0) as out:
        for row in range(21):
            out.write({"__key__": f"{row:05d}", "jpg": bytes([row]), "txt": f"words {row}"})
    return tmp_path


def test_a_plain_folder(plain: Path, pairmill: Pairmill) -> None:
    scanned = index.build(Folder(plain))
    done = pairmill("index", plain, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["shards"], result["samples"], result["bytes"]) == (3, 21, scanned.tar_bytes)
    loaded = index.load(Folder(plain))
    assert loaded.shards == scanned.shards
    assert all(np.array_equal(loaded.ends(number), scanned.ends(number)) for number in range(3))
    assert verify(str(plain)).faults == []
    stream = ShardStream(str(plain), global_batch_size=7)
    assert {sample["__key__"]: sample["txt"] for sample in stream.samples()} == {
        f"{row:05d}": f"words {row}".encode() for row in range(21)
    }
    assert shards.open(plain)["00017"]["jpg"] == bytes([17])


def test_digests_are_taken_if_asked_for(plain: Path, pairmill: Pairmill) -> None:
    assert pairmill("index", plain, "--digests").returncode == 0
    for shard in index.load(Folder(plain)).shards:
        assert shard.tar_sha256 == file_digest(Folder(plain), shard.tar)
    data = bytearray((plain / "part-001.tar").read_bytes())
    data[700] ^= 1
    (plain / "part-001.tar").write_bytes(data)
    assert ["the tar's SHA-256" in fault.what for fault in verify(str(plain)).faults] == [True]


def test_mistakes_end_in_one_line_and_write_nothing(plain: Path, mistake: Callable[..., str]) -> None:
    assert "no shards here" in mistake("index", plain / "nothing")
    assert not (plain / "nothing").exists()
    tar = plain / "part-002.tar"
    tar.write_bytes(tar.read_bytes()[:600])
    done = subprocess.run(
        [sys.executable, "-m", "pairmill.cli", "index", str(plain)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "part-002.tar: damaged tar (byte 1024: the archive ends" in done.stderr.splitlines()[-1]
    assert not (plain / INDEX).exists()


@pytest.fixture
def pictures(tmp_path: Path) -> Iterator[str]:
    """Three pictures on a server; gives its base URL."""
    (tmp_path / "web").mkdir()
    for number in range(3):
        Image.new("RGB", (40, 40), (80 * number, 9, 9)).save(tmp_path / "web" / f"{number}.png")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
def test_what_img2dataset_wrote(tmp_path: Path, pictures: str, pairmill: Pairmill) -> None:
    pytest.importorskip("img2dataset")
    rows = ["url,caption", *(f"{pictures}/{number}.png,picture {number}" for number in range(3))]
    (tmp_path / "rows.csv").write_text("\n".join(rows) + "\n")
    out = tmp_path / "out"
    made = subprocess.run(
        [sys.executable, "-c", IMG2DATASET, str(tmp_path / "rows.csv"), str(out)],
        capture_output=True, text=True, check=False, timeout=200, cwd=tmp_path,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert {path.name for path in out.glob("*.tar")} == {"00000.tar", "00001.tar"}
    before = {sample["txt"] for sample in ShardStream(str(out), global_batch_size=1).samples()}
    assert pairmill("index", out).returncode == 0
    stream = ShardStream(str(out), global_batch_size=1, decode=True)
    seen = {sample["__key__"]: sample for sample in stream.samples()}
    assert {sample["txt"].encode() for sample in seen.values()} == before
    assert before == {f"picture {number}".encode() for number in range(3)}
    samples = shards.open(out, decode=True)
    for key, sample in seen.items():
        assert samples[key]["json"] == sample["json"]
        assert (samples[key]["jpg"] == sample["jpg"]).all()
        assert sample["json"]["key"] == key
    assert verify(str(out)).faults == []
