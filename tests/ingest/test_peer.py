"""img2dataset as the engine: the parity oracle, under this corpus' rules."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from PIL import Image

from infra.cluster import ClusterConfig
from ingest.config import ImageConfig, IngestConfig, PlanConfig
from ingest.plan import plan
from ingest.run import ingest
from ingest.worker import ShardWorker
from pairmill.sample_web.process import SampleWeb
from pairmill.sample_web.rows import write_rows
from shards.verify import verify

pytest.importorskip("img2dataset")
KINDS = ["not_found", "noai", "truncated_image", "redirect", "error_once", "too_small", "html"]


def planned(folder: Path, web: SampleWeb, name: str, kinds: list[str], limit: int = 40) -> Path:
    web.reset()
    rows = write_rows(folder / f"rows-{name}", web.base_urls, limit=limit, share=0.4 if kinds else 0, kinds=kinds)
    plan(str(folder / name), PlanConfig(urls=str(rows.urls), rows_per_shard=40))
    return folder / name


def rows_of(corpus: Path) -> dict[str, dict[str, Any]]:
    paths = sorted((corpus / "raw").glob("*.parquet"))
    return {row["key"]: row for path in paths for row in pq.read_table(path).to_pylist()}


def by_peer(config: IngestConfig) -> IngestConfig:
    return config.model_copy(update={"engine": "img2dataset"})


def test_both_engines_agree_row_by_row(
    tmp_path: Path, web: SampleWeb, config: IngestConfig, local_ray: ClusterConfig
) -> None:
    native, peer = planned(tmp_path, web, "native", KINDS), planned(tmp_path, web, "peer", KINDS)
    ingest(str(native), config, local_ray)
    web.reset()
    totals = ingest(str(peer), by_peer(config), local_ray)
    ours, theirs = rows_of(native), rows_of(peer)
    assert list(ours) == list(theirs)
    assert totals["rows_in"] == len(theirs) == sum(totals["by_status"].values())
    both = [key for key, row in ours.items() if row["status"] == theirs[key]["status"] == "success"]
    assert len(both) > len(ours) / 2
    for key in both:
        for name in ("url", "caption", "sha256", "width", "height", "original_width", "original_height"):
            assert ours[key][name] == theirs[key][name], (key, name)
    # What the peer reads of a cut body it keeps, and the other way round nothing: ours is the stricter.
    assert {ours[key]["reason"] for key in ours if ours[key]["status"] != theirs[key]["status"]} <= {
        "decode_error", "truncated_body", "opt_out", "robots_txt",
    }  # fmt: skip
    assert verify(str(peer / "raw")).faults == []
    tars = [str(path) for path in sorted((peer / "raw").glob("*.tar"))]
    samples = list(wds.WebDataset(tars, shardshuffle=False).decode("pilrgb"))
    assert [one["__key__"] for one in samples] == [key for key, row in theirs.items() if row["status"] == "success"]
    for path in (peer / "raw").glob("*_stats.json"):
        assert json.loads(path.read_text())["engine"] == "img2dataset"


@pytest.mark.parametrize("mode", ["no", "keep_ratio", "keep_ratio_largest", "center_crop", "border"])
@pytest.mark.parametrize("only_if_bigger", [False, True])
def test_sizes_and_pixels_are_the_peers(mode: Any, only_if_bigger: bool) -> None:
    from img2dataset.resizer import Resizer

    from ingest.image import Picture, process

    config = ImageConfig(size=100, resize=mode, only_if_bigger=only_if_bigger, phash=False, min_side=8, max_aspect=3.0)
    theirs = Resizer(100, mode, only_if_bigger, min_image_size=8, max_aspect_ratio=3.0)
    rng = np.random.default_rng(5)
    for width, height in ((300, 200), (201, 333), (90, 60), (99, 150), (320, 101), (640, 480), (7, 7), (400, 100)):
        coarse = Image.fromarray(rng.integers(0, 256, (height // 20 + 2, width // 20 + 2, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=92)
        data, wide, high, _, _, error = theirs(io.BytesIO(buffer.getvalue()))
        ours = process(buffer.getvalue(), config)
        assert isinstance(ours, Picture) == (error is None), (width, height, error)
        if isinstance(ours, Picture):
            assert (ours.width, ours.height) == (wide, high)
            first, second = (Image.open(io.BytesIO(one)).convert("RGB") for one in (ours.data, data))
            assert first.size == second.size
            error_2 = np.mean((np.asarray(first, dtype=float) - np.asarray(second, dtype=float)) ** 2)
            # White borders are ours, black ones the peer's; their place is compared by the size.
            assert mode == "border" or 10 * np.log10(255**2 / max(error_2, 1e-9)) > 30


def test_faces_are_blurred_by_both(tmp_path: Path, web: SampleWeb, config: IngestConfig) -> None:
    from ingest.peer import PeerWorker

    web.reset()
    rows = write_rows(tmp_path / "rows", web.base_urls, limit=4, share=0)
    table = pq.read_table(rows.urls).slice(0, 4)
    boxes = ["[[0.1, 0.1, 0.9, 0.9]]", "", "no boxes", "[[0.2, 0.2, 0.4, 0.5]]"]
    pq.write_table(table.append_column("faces", [boxes]), tmp_path / "faces.parquet")
    hiding = config.model_copy(update={"image": config.image.model_copy(update={"faces_col": "faces"})})
    reasons = {}
    for name, kind in (("native", ShardWorker), ("peer", PeerWorker)):
        corpus = tmp_path / name
        plan(str(corpus), PlanConfig(urls=str(tmp_path / "faces.parquet")))
        worker = kind(str(corpus), hiding)
        try:
            worker.run(0)
        finally:
            worker.close()
        reasons[name] = {row["faces"]: row["reason"] for row in rows_of(corpus).values()}
    assert reasons["native"] == reasons["peer"] == dict.fromkeys(boxes, "") | {"no boxes": "bad_boxes"}


def test_a_private_address_is_refused_before_the_peer_asks(tmp_path: Path, config: IngestConfig) -> None:
    from ingest.peer import PeerWorker

    (tmp_path / "rows.txt").write_text("http://127.0.0.1:9/1.jpg\nhttp://localhost:9/2.jpg\n")
    corpus = tmp_path / "corpus"
    plan(str(corpus), PlanConfig(urls=str(tmp_path / "rows.txt")))
    public = config.model_copy(update={"fetch": config.fetch.model_copy(update={"allow_private": False})})
    stats = PeerWorker(str(corpus), public).run(0)
    assert stats["by_reason"] == {"blocked_address": 2}


def test_without_the_package_one_line_says_so(tmp_path: Path, web: SampleWeb) -> None:
    corpus = planned(tmp_path, web, "corpus", [], limit=5)
    script = (
        "import sys, importlib.util as u; find = u.find_spec; "
        "u.find_spec = lambda name, *more: None if name == 'img2dataset' else find(name, *more); "
        "from pairmill.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", script, "ingest", str(corpus), "--engine", "img2dataset"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 2, ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
    assert "extra `img2dataset`" in ended.stderr


def test_it_is_not_imported_unless_asked(tmp_path: Path, web: SampleWeb) -> None:
    script = "import sys, ingest.run, pairmill.cli; print([name for name in sys.modules if 'img2dataset' in name])"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert ended.stdout.strip() == "[]"
