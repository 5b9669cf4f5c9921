"""Embeddings of a folder by a tiny run: equal to the model's own features, whole files, going on, damaged samples."""

from __future__ import annotations

import io
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import shards
from infra.errors import UserError
from infra.storage import Folder
from pairmill.cli import main
from shards.tar import END, header, padded
from train.augment import normalise
from train.config import RunConfig
from train.embed import RECORD, embed
from train.evaluate.run import load_model, square
from train.evaluate.suite import write_suite
from train.launch import train

MakeConfig = Callable[..., RunConfig]
Draw = Callable[[str, str, int], bytes]


@pytest.fixture
def run(finished: Path, make_config: MakeConfig) -> Path:
    """A run of two steps, with averaged weights."""
    if not finished.exists():
        train(make_config(length="2 steps", checkpoint={"every": "2 steps"}), str(finished))
    return finished


def rows(out: Path) -> dict[str, Any]:
    """Embeddings by key over all files."""
    tables = [pq.read_table(file) for file in sorted(out.glob("*.parquet"))]
    table = pa.concat_tables(tables)
    return dict(zip(table["key"].to_pylist(), table["embedding"].to_pylist(), strict=True))


def write_shard(folder: Path, name: str, members: dict[str, bytes]) -> None:
    with Folder(folder).create(f"{name}.tar") as tar:
        for member, data in members.items():
            tar.write(header(member, len(data)) + data + bytes(padded(len(data)) - len(data)))
        tar.write(END)


def test_every_sample_has_the_averaged_models_unit_features(run: Path, corpus: Path, tmp_path: Path) -> None:
    result = embed(run, str(corpus), str(tmp_path / "out"), threads=2)
    assert {name: result[name] for name in ("shards", "skipped", "samples", "undecodable", "width", "step")} == {
        "shards": 3, "skipped": 0, "samples": 100, "undecodable": 0, "width": 16, "step": 2,
    }  # fmt: skip
    file = pq.read_table(tmp_path / "out" / "00000.parquet")
    assert file.schema.names == ["key", "embedding"]
    assert file.schema.field("embedding").type == pa.list_(pa.float16(), 16)
    found, samples = rows(tmp_path / "out"), shards.open(str(corpus))
    assert list(found) == [one["__key__"] for one in samples]
    assert np.allclose(np.linalg.norm(np.asarray(list(found.values()), np.float32), axis=1), 1, atol=2e-3)
    model, *_ = load_model(run)
    pixels = square(Image.open(io.BytesIO(samples[57]["png"])).convert("RGB"), 16)
    batch = normalise(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None])
    with torch.no_grad():
        expected = model.eval().encode_image(batch, normalize=True)[0]
    assert np.allclose(found[samples[57]["__key__"]], expected.numpy(), atol=2e-3)


def test_an_interrupted_run_goes_on_and_a_file_that_is_there_is_left_alone(
    run: Path, corpus: Path, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    embed(run, str(corpus), str(whole), threads=2)
    shutil.copytree(whole, parts)
    (parts / "00001.parquet").unlink()
    (parts / ".tmp-00001.parquet-0123abcd").write_bytes(b"torn")
    before = (parts / "00000.parquet").stat().st_mtime_ns
    result = embed(run, str(corpus), str(parts), threads=2)
    assert (result["skipped"], result["samples"]) == (2, 40)
    assert rows(parts).keys() == rows(whole).keys()
    assert (parts / "00000.parquet").stat().st_mtime_ns == before
    assert not list(parts.glob(".tmp-*"))


def test_a_sample_that_cannot_be_decoded_is_named_and_left_out(
    run: Path, tmp_path: Path, drawing: Draw, caplog: pytest.LogCaptureFixture
) -> None:
    good = drawing("red", "circle", 1)
    write_shard(tmp_path / "tars", "00000", {"000000000.png": good, "000000001.png": good[:60], "000000002.png": good})
    with caplog.at_level(logging.WARNING):
        result = embed(run, str(tmp_path / "tars"), str(tmp_path / "out"))
    assert (result["samples"], result["undecodable"]) == (2, 1)
    assert list(rows(tmp_path / "out")) == ["000000000", "000000002"]
    assert "000000001 has no embedding" in caplog.text


def test_a_final_folder_gives_the_raw_keys_too(run: Path, tmp_path: Path, drawing: Draw) -> None:
    facts = json.dumps({"key": "000000000", "source_key": "000070003"}).encode()
    members = {"000000000.png": drawing("red", "circle", 1), "000000000.json": facts}
    write_shard(tmp_path / "final", "00000", members)
    embed(run, str(tmp_path / "final"), str(tmp_path / "out"))
    assert pq.read_table(tmp_path / "out" / "00000.parquet")["source_key"].to_pylist() == ["000070003"]


def test_embeddings_of_another_folder_or_model_are_not_mixed(run: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    embed(run, str(corpus), str(out), threads=2)
    shutil.copytree(corpus, tmp_path / "copy")
    with pytest.raises(UserError, match=r"another folder or model \(folder: "):
        embed(run, str(tmp_path / "copy"), str(out))
    (out / RECORD).unlink()
    with pytest.raises(UserError, match="not `embed`'s"):
        embed(run, str(corpus), str(out))
    with pytest.raises(UserError, match="no such folder"):
        embed(run, str(tmp_path / "nothing"), str(out))


def test_the_command_prints_what_was_done(
    run: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["embed", str(run), str(corpus), "--out", str(tmp_path / "out"), "--threads", "2", "--json"])
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out)["samples"] == 100


def test_a_suite_is_embedded_by_the_keys_of_its_pictures_in_tars_and_in_files(
    run: Path, tmp_path: Path, drawing: Draw
) -> None:
    one, other = drawing("red", "circle", 1), drawing("blue", "square", 2)
    samples = [{"key": "s0", "png": one, "cls": 0}, {"key": "s1", "png": other, "cls": 0}]
    write_suite(str(tmp_path / "tars"), samples, ["circle"], ["{c}"])
    for name, body in (("a/one.png", one), ("two.PNG", other), ("b/broken.png", one[:60])):
        (tmp_path / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "files" / name).write_bytes(body)
    embed(run, str(tmp_path / "tars"), str(tmp_path / "of tars"))
    result = embed(run, str(tmp_path / "files"), str(tmp_path / "of files"))
    assert (result["shards"], result["samples"], result["undecodable"]) == (1, 2, 1)
    by_key, by_path = rows(tmp_path / "of tars"), rows(tmp_path / "of files")
    assert (list(by_key), list(by_path)) == (["s0", "s1"], ["a/one.png", "two.PNG"])
    assert np.allclose(list(by_key.values()), list(by_path.values()), atol=2e-3)
    (tmp_path / "files" / "new.png").write_bytes(one)
    with pytest.raises(UserError, match=r"another folder or model \(files_sha256: "):
        embed(run, str(tmp_path / "files"), str(tmp_path / "of files"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no shards here .* and no picture files"):
        embed(run, str(tmp_path / "empty"), str(tmp_path / "of nothing"))
