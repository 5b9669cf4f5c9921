"""A small corpus and a run at every stage of their making, with words from a hostile web in them; a browser."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw
from playwright.sync_api import Browser, sync_playwright

from dedup.outcome import SCHEMA as REMOVED_SCHEMA
from infra.config import Config
from infra.storage import Folder
from shards.layout import DEDUP, FINAL, PLAN, RAW, REMOVED, SIDECAR, Reason, Status, part_name, sample_key, shard_name
from shards.manifest import Manifest
from shards.writer import writing
from train.evaluate.suite import write_suite

STARTED = datetime(2026, 5, 4, 12, 0, tzinfo=UTC)
SCRIPT = "<script>document.title='owned'</script>"
HANDLER = """"><img src=x onerror="document.title='owned'">"""
ADDRESS = "javascript:document.title='owned'"
TURNED = "\u202egnp.exe\u0007 " + "x" * 4000
SHARDS, ROWS = 3, 16
COLOURS = ("crimson", "seagreen", "royalblue", "orange", "purple", "teal")
FAILURES = {
    1: (Status.FAILED_TO_DOWNLOAD, Reason.HTTP_STATUS, {"detail": "HTTP 404", "http_status": 404}),
    5: (Status.FILTERED, Reason.ASPECT, {"detail": "640x64 pixels", "original_width": 640, "original_height": 64}),
    9: (Status.FAILED_TO_RESIZE, Reason.NOT_AN_IMAGE, {"detail": f"begins with b'{SCRIPT}'"}),
}


def drawn(number: int, side: int = 96, form: str = "jpeg") -> bytes:
    """A picture of its own for each number."""
    image = Image.new("RGB", (side, side), "white")
    box = (4 + number % 7, 6, side - 8, side - 6 - number % 11)
    ImageDraw.Draw(image).ellipse(box, fill=COLOURS[number % len(COLOURS)], outline="black", width=2)
    out = io.BytesIO()
    image.save(out, form)
    return out.getvalue()


def raw_row(shard: int, row: int) -> tuple[dict[str, Any], bytes | None]:
    """One row of the raw shards and its picture: hostile words in some, broken bytes in one."""
    captions = {2: SCRIPT, 3: HANDLER, 4: TURNED, 5: HANDLER, 6: ""}
    status, reason, more = FAILURES.get(row, (Status.SUCCESS, Reason.NONE, {}))
    fields = dict.fromkeys(SIDECAR.names) | {
        "key": sample_key(shard, row), "status": status, "reason": reason,
        "url": f"http://pictures.test/{shard}/{row}.jpg?a=<b>", "caption": captions.get(row, f"circle {shard}.{row}"),
        "fetched_at": STARTED + timedelta(seconds=40 * shard + 2 * row), "bytes": 9_000, "width": 96, "height": 96,
    }  # fmt: skip
    fields |= more
    picture = None if reason else drawn(shard * ROWS + row, 300 if row == 7 else 96)
    return fields, b"no picture" if (shard, row) == (2, 8) else picture


class CorpusMaker:
    """Takes a corpus through its stages, one call each, as the stages leave it."""

    def __init__(self, path: Path) -> None:
        self.folder = Folder(path)
        self.manifest = Manifest.open(self.folder)

    def plan(self) -> CorpusMaker:
        """Rows planned, and rows that were not worth a download."""
        self.manifest.begin(PLAN, Config())
        rejected = {
            "url": [ADDRESS, "http://a.test/1.jpg", "http://[broken"], "caption": ["a bad address", "", SCRIPT],
            "reason": [Reason.BAD_URL, Reason.CAPTION_EMPTY, Reason.BAD_URL],
        }  # fmt: skip
        self._parquet(PLAN, "rejected-00000.parquet", pa.table(rejected))
        for part in range(SHARDS):
            self._parquet(PLAN, part_name(part), pa.table({"key": [sample_key(part, row) for row in range(ROWS)]}))
        rows = SHARDS * ROWS
        self.manifest.finish(PLAN, {
            "rows_in": rows + 3, "rows_out": rows, "by_status": {"planned": rows, "filtered": 3},
            "by_reason": {"bad_url": 2, "caption_empty": 1}, "parts": SHARDS,
        })  # fmt: skip
        return self

    def ingest(self, shards: int = SHARDS) -> CorpusMaker:
        """So many raw shards; the stage is done when they are all there."""
        self.manifest.begin(RAW, Config())
        for shard in range(shards):
            start = (STARTED + timedelta(seconds=40 * shard)).timestamp()
            more = {"start_time": start, "end_time": start + 2 * ROWS, "bytes": 9_000 * ROWS}
            with writing(self.folder / RAW, shard_name(shard), SIDECAR, more) as writer:
                for row in range(ROWS):
                    writer.add(*raw_row(shard, row))
        if shards == SHARDS:
            kept = SHARDS * (ROWS - len(FAILURES))
            reasons = {str(reason): SHARDS for _, reason, _ in FAILURES.values()}
            statuses = {str(status): SHARDS for status, _, _ in FAILURES.values()}
            self.manifest.finish(RAW, {
                "rows_in": SHARDS * ROWS, "by_status": statuses | {"success": kept}, "by_reason": reasons,
                "seconds": 96,
            })  # fmt: skip
        return self

    def dedup(self) -> CorpusMaker:
        """One sample of three is kept of a cluster; one of two of another; one pair's keeper has gone."""
        self.manifest.begin(DEDUP, Config())
        rows = [("000000003", "000000002", "perceptual", 12), ("000010002", "000000002", "exact", 0),
                ("000020004", "000010004", "perceptual", 31), ("000020010", "000999999", "exact", 0)]  # fmt: skip
        unknown = [[None] * len(rows)] * 3
        columns = [*zip(*rows, strict=True), [int(row[1]) for row in rows], *unknown]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, REMOVED_SCHEMA, strict=True)]
        self._parquet(DEDUP, REMOVED, pa.Table.from_arrays(arrays, schema=REMOVED_SCHEMA))
        self.manifest.finish(DEDUP, self._deduplicated() | {"kept": SHARDS * (ROWS - len(FAILURES)) - 4, "removed": 4})
        return self

    def repack(self) -> CorpusMaker:
        """All kept samples in one final shard."""
        self.manifest.begin(FINAL, Config())
        gone = {"000000003", "000010002", "000020004", "000020010"}
        rows = [raw_row(shard, row) for shard in range(SHARDS) for row in range(ROWS)]
        kept = [(fields, picture) for fields, picture in rows if picture and fields["key"] not in gone]
        with writing(self.folder / FINAL, shard_name(0), SIDECAR, {}) as writer:
            for number, (fields, picture) in enumerate(kept):
                writer.add(fields | {"key": sample_key(0, number)}, picture)
        self.manifest.finish(FINAL, self._deduplicated() | {"samples": len(kept), "shards": 1})
        return self

    def _deduplicated(self) -> dict[str, Any]:
        samples = SHARDS * (ROWS - len(FAILURES))
        reasons = {"duplicate_exact": 2, "duplicate_perceptual": 2}
        return {"rows_in": samples, "by_status": {"success": samples - 4, "filtered": 4}, "by_reason": reasons}

    def _parquet(self, stage: str, name: str, table: pa.Table) -> None:
        out = io.BytesIO()
        pq.write_table(table, out)
        (self.folder / stage).write(name, out.getvalue())


def write_run(path: Path) -> str:
    """Write a run's folder: a log with a torn last line, and results on two suites, of which one has gone."""
    run = Folder(path / "run")
    lines = [
        {"step": step, "samples": 64 * step, "loss": 5 / step, "accuracy": step / 400, "temperature": 0.07,
         "learning_rate": 1e-3, "samples_per_s": 300 + step % 9, "gradient_norm": float("nan") if step == 7 else 1.0}
        for step in range(1, 301)
    ]  # fmt: skip
    lines.append({"step": 300, "samples": 64 * 300, "zero_shot": 0.4})
    run.write("log.jsonl", ("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3').encode())
    names = ["red circle", SCRIPT, HANDLER, TURNED, "blue circle", "green circle"]
    samples = [
        {"key": f"{at:05d}", "png": drawn(at, form="png"), "cls": at % 6, "txt": names[at % 6]} for at in range(30)
    ]
    write_suite(str(path / "held_out"), samples, [name.replace("\n", " ") for name in names], ["{c}"])
    predictions = [
        {"key": f"{at:05d}", "name": names[at % 6],
         "top": [{"name": names[(at * (at % 2) + rank) % 6], "score": 0.3, "probability": 0.5 / (1 + rank)}
                 for rank in range(5)]}
        for at in range(30)
    ]  # fmt: skip
    recall = {"recall@1": 0.1, "recall@5": 0.5, "recall@10": 1.0}
    result = {"names": 6, "images": 30, "top1": 0.4, "top5": 0.9, "predictions": predictions}
    known = {"suite": str(path / "held_out"), "retrieval": {"image_to_text": recall, "text_to_image": recall}}
    (run / "evaluation").write_json("held_out_style.json", result | known)
    (run / "evaluation").write_json("gone.json", result | {"suite": str(path / "nowhere"), "retrieval": None})
    return run.url


@pytest.fixture
def maker(tmp_path: Path) -> CorpusMaker:
    """A corpus folder in which nothing has happened yet."""
    return CorpusMaker(tmp_path / "corpus")


@pytest.fixture
def finished(tmp_path: Path, maker: CorpusMaker) -> tuple[str, str]:
    """The folders of a finished corpus and of a finished run."""
    return maker.plan().ingest().dedup().repack().folder.url, write_run(tmp_path)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A real Chromium, the system's."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium here; infra/install-debian-packages.sh installs it")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield opened
        finally:
            opened.close()
