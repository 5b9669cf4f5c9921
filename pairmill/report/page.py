"""Gathers a corpus' accounting, sample pictures and training curve, and writes them as one page."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import jinja2
import pyarrow.parquet as pq

from infra.storage import Folder
from shards.layout import FINAL
from shards.manifest import STAGES, Manifest

PICTURES = 60
TEMPLATE = Path(__file__).parent / "template.html.j2"


def build(corpus: str, run: str | None, out: str) -> str:
    """Write the report about `corpus`, and `run` if given, to the local file `out`; return its path.

    Raises:
        UserError: there is no corpus at `corpus`.
    """
    folder = Folder(corpus)
    manifest = Manifest.existing(folder)
    facts = {
        "corpus": folder.url,
        "stages": [(stage, manifest.totals(stage)) for stage in STAGES if manifest.is_done(stage)],
        "kept": _kept(folder / FINAL),
        "curve": _curve(Folder(run)) if run else "",
        "evaluations": _evaluations(Folder(run)) if run else [],
    }
    # Captions come from the web: autoescape keeps them text.
    environment = jinja2.Environment(autoescape=True)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(facts)
    target = Path(out)
    Folder(target.parent).write(target.name, page.encode())
    return str(target)


def _kept(final: Folder) -> list[dict[str, str]]:
    pictures: list[dict[str, str]] = []
    for name in final.names(".parquet"):
        if name == "index.parquet":
            continue
        columns = ["caption", "member", "image_offset", "image_bytes"]
        for row in pq.read_table(io.BytesIO(final.read(name)), columns=columns).to_pylist():
            start, tar = row["image_offset"], name.replace(".parquet", ".tar")
            image = final.read_range(tar, start, start + row["image_bytes"])
            kind = {"jpg": "jpeg"}.get(row["member"].rsplit(".", 1)[1], row["member"].rsplit(".", 1)[1])
            data = f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
            pictures.append({"caption": row["caption"], "data": data})
            if len(pictures) == PICTURES:
                return pictures
    return pictures


def _curve(run: Folder) -> str:
    """Return the loss as the points of an SVG polyline in a 600 x 200 box; empty without a log."""
    if not run.exists("log.jsonl"):
        return ""
    lines = [json.loads(line) for line in run.read("log.jsonl").splitlines() if line]
    points = [(line["samples"], line["loss"]) for line in lines if "loss" in line and "samples" in line]
    if not points:
        return ""
    right, top = max(x for x, _ in points) or 1, max(y for _, y in points) or 1
    return " ".join(f"{600 * x / right:.1f},{200 - 200 * y / top:.1f}" for x, y in points)


def _evaluations(run: Folder) -> list[dict[str, Any]]:
    folder = run / "evaluation"
    return [{"name": name.removesuffix(".json"), **folder.read_json(name)} for name in folder.names(".json")]
