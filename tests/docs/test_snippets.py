"""The programs of the ML engineer's page run as they stand there."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import s3fs
from PIL import Image

from infra.storage import Folder
from shards import index
from shards.layout import SIDECAR, Reason, Status, sample_key, shard_name, sidecar_schema
from shards.writer import writing

PAGE = Path(__file__).parents[2] / "docs" / "ml-engineer.md"
SECTION = "## Shards in a loop of your own"
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SNIPPETS = FENCE.findall(PAGE.read_text(encoding="utf-8").partition(SECTION)[2].partition("\n## ")[0])
SHARDS, ROWS = 3, 100


def jpeg(number: int) -> bytes:
    """A small picture; every tenth is higher than wide."""
    shape = (40, 24, 3) if number % 10 == 3 else (24, 40, 3)
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 255, shape, dtype=np.uint8)).save(out, "jpeg")
    return out.getvalue()


def write(folder: Folder) -> None:
    """Write shards as `repack` does, but for what no snippet reads."""
    for shard in range(SHARDS):
        with writing(folder, shard_name(shard), sidecar_schema(), {}) as writer:
            for row in range(ROWS):
                fields: dict[str, Any] = dict.fromkeys(SIDECAR.names) | {
                    "key": sample_key(shard, row), "url": f"http://h/{shard}/{row}.jpg",
                    "caption": "a picture" + " of another" * (row % 3), "status": Status.SUCCESS, "reason": Reason.NONE,
                }  # fmt: skip
                writer.add(fields, jpeg(shard * ROWS + row))
    index.save(folder, index.build(folder))


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the corpora that the page names."""
    there = tmp_path_factory.mktemp("corpora")
    for name in ("my-corpus/final", "licensed/final"):
        write(Folder(there / name))
    return there


@pytest.fixture
def run(corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    """Run a snippet in a folder of its own where the corpora are; return its names."""
    for name in ("my-corpus", "licensed"):
        (tmp_path / name).symlink_to(corpora / name)
    monkeypatch.chdir(tmp_path)

    def run_it(snippet: str) -> dict[str, Any]:
        names: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(snippet, str(PAGE), "exec"), names)
        return names

    return run_it


def snippet(sign: str) -> str:
    """Return the one snippet of the page that has this in it."""
    (found,) = (one for one in SNIPPETS if sign in one)
    return found


def test_every_snippet_has_a_test_below() -> None:
    below = Path(__file__).read_text(encoding="utf-8")
    signs = re.findall(r'snippet\("([^"]+)"\)', below)
    assert len(SNIPPETS) == len({snippet(sign) for sign in signs}) >= 8


def test_a_plain_loop(run: Callable[[str], dict[str, Any]]) -> None:
    names = run(snippet("texts = batch"))
    assert names["images"].shape == (256, 3, 224, 224)
    assert abs(float(names["images"].mean())) < 1  # noise around grey, normalised
    assert len(names["texts"]) == 256
    assert names["stream"].state_dict()["epoch"] == 2


def test_loader_processes(run: Callable[[str], dict[str, Any]]) -> None:
    assert run(snippet("prefetch=2"))["batch"]["image"].shape == (256, 3, 64, 64)


def test_resumed_from_a_checkpoint(run: Callable[[str], dict[str, Any]]) -> None:
    whole = run(snippet("with_states"))
    assert whole["stream"].state_dict()["epoch"] == 2
    # From the last checkpoint one batch is left of the second epoch's four: the same as it was.
    again = run(snippet("with_states"))
    assert again["batch"]["key"] == whole["batch"]["key"]


def test_torchdata(run: Callable[[str], dict[str, Any]]) -> None:
    run(snippet("StatefulDataLoader("))


def test_webdataset(run: Callable[[str], dict[str, Any]]) -> None:
    assert run(snippet("wds.DataPipeline"))["images"].shape == (32, 64, 64, 3)


def test_keep_lists_and_mixes(run: Callable[[str], dict[str, Any]]) -> None:
    names = run(snippet("MixedStream(["))
    assert len(names["keys"]) == SHARDS * sum(row % 3 > 0 for row in range(ROWS))
    assert {sample["__corpus__"] for sample in names["batch"]} == {0, 1}


def test_an_object_store_through_a_disk(
    run: Callable[[str], dict[str, Any]], corpora: Path, s3_gateway: Any, tmp_path: Path
) -> None:
    s3fs.S3FileSystem().mkdir("bucket")
    here, there = Folder(corpora / "my-corpus" / "final"), Folder("s3://bucket/my-corpus/final")
    for name in here.names():
        there.write(name, here.read(name))
    names = run(snippet("s3://bucket"))
    assert names["stream"].state_dict()["epoch"] == 2
    assert any(path.is_file() for path in (tmp_path / "cache").rglob("*"))


def test_holes(run: Callable[[str], dict[str, Any]]) -> None:
    names = run(snippet("only_wide"))
    assert 0 < names["stream"].holes <= SHARDS * ROWS // 10
    assert all(sample["jpg"].shape == (24, 40, 3) for sample in names["sound"])
