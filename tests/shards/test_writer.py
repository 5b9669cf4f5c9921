"""The writer: what a member's JSON makes of values that JSON does not have."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

import shards
from infra.storage import Folder
from shards.layout import SIDECAR, Reason, Status, sample_key, sidecar_schema
from shards.verify import verify
from shards.writer import writing

NUMBERS = pa.list_(pa.float64())
PASSTHROUGH = pa.schema([
    ("plain", pa.float64()), ("nan", pa.float64()), ("far", pa.float32()), ("several", NUMBERS),
    ("inner", pa.struct([("score", pa.float64()), ("word", pa.string())])), ("none", pa.float64()),
])  # fmt: skip


def strict(text: bytes) -> Any:
    """Read JSON as other languages do: NaN and Infinity are no values."""

    def refused(name: str) -> Any:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refused)


def test_a_number_that_json_does_not_have_becomes_null(tmp_path: Path) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "jpeg")
    row = dict.fromkeys(SIDECAR.names) | {
        "key": sample_key(0, 0), "url": "http://h/1.jpg", "caption": "NaN is a word here",
        "status": Status.SUCCESS, "reason": Reason.NONE,
        "plain": 0.5, "nan": math.nan, "far": -math.inf, "several": [1.0, math.nan, None],
        "inner": {"score": math.inf, "word": "NaN"}, "none": None,
    }  # fmt: skip
    folder = Folder(tmp_path)
    with writing(folder, "00000", sidecar_schema(PASSTHROUGH), {}) as writer:
        writer.add(row, picture.getvalue())
    facts = strict(shards.open(tmp_path)[0]["json"])
    assert {name: facts[name] for name in PASSTHROUGH.names} == {
        "plain": 0.5, "nan": None, "far": None, "several": [1.0, None, None],
        "inner": {"score": None, "word": "NaN"}, "none": None,
    }  # fmt: skip
    assert verify(folder).faults == []
    (kept,) = pq.read_table(tmp_path / "00000.parquet").to_pylist()
    assert math.isnan(kept["nan"])
    assert kept["far"] == -math.inf
