"""A tiny corpus of drawn shapes, and runs small enough for tests."""

from __future__ import annotations

import importlib.util
import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from infra.config import parse
from infra.storage import Folder
from shards.index import build, save
from shards.tar import END, header, padded
from train.config import RunConfig

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers.py"
COLOURS = ("red", "green", "blue", "orange", "purple", "black")
SHAPES = ("circle", "square", "line")


def drawing(colour: str, shape: str, seed: int, side: int = 32) -> bytes:
    """A PNG of a shape at a place that the seed chooses."""
    image = Image.new("RGB", (side, side), "white")
    place = random.Random(seed)
    left, upper = place.randint(2, 10), place.randint(2, 10)
    box = (left, upper, left + 16, upper + 16)
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    else:
        draw.line(box, fill=colour, width=3)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_corpus(folder: Path, samples: int, per_shard: int = 40) -> Path:
    """Shards of drawings with captions such as `a red circle`."""
    target = Folder(folder)
    for shard, first in enumerate(range(0, samples, per_shard)):
        with target.create(f"{shard:05d}.tar") as tar:
            for number in range(first, min(first + per_shard, samples)):
                colour, shape = COLOURS[number % len(COLOURS)], SHAPES[number % len(SHAPES)]
                members = {
                    "png": drawing(colour, shape, number),
                    "txt": f"a {colour} {shape}, number {number}".encode(),
                    "json": b"{}",
                }
                for name, data in members.items():
                    key = f"{shard:05d}{number - first:04d}"
                    tar.write(header(f"{key}.{name}", len(data)) + data)
                    tar.write(bytes(padded(len(data)) - len(data)))
            tar.write(END)
    save(target, build(target))
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 samples in three shards."""
    return write_corpus(tmp_path_factory.mktemp("corpus"), 100)


@pytest.fixture
def make_config(corpus: Path) -> Callable[..., RunConfig]:
    """Builds a tiny run; keyword arguments replace or extend whole tables."""

    def make(**tables: Any) -> RunConfig:
        raw: dict[str, Any] = {
            "length": "12 steps",
            "data": {"folder": str(corpus), "global_batch_size": 16, "image_size": 16},
            "tokenizer": {"vocabulary": 320},
            "model": {
                "embed_dim": 16,
                "vision": {"widths": [4, 8], "depths": [1, 1], "statistics_group": 4},
                "text": {"context": 12, "width": 16, "layers": 1, "heads": 2},
            },
            "augment": {"rotation_degrees": 10, "hue_degrees": 10, "brightness": 0.2},
            "optim": {"ema": 0.9},
            "parallel": {"precision": "float32", "threads": 1},
            "checkpoint": {"every": "4 steps"},
            "log": {"every": "1 steps"},
        }
        if "name" in tables.get("model", {}):
            raw["model"] = {}  # a named model has sizes of its own
        for name, table in tables.items():
            raw[name] = {**raw[name], **table} if isinstance(table, dict) and name in raw else table
        return parse(raw, RunConfig, source="test")

    return make


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a module's tests keep a finished run, once one has made it, to take copies of."""
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture(name="drawing")
def drawing_fixture() -> Callable[[str, str, int], bytes]:
    """Draws a shape: colour, shape, seed to PNG."""
    return drawing


@pytest.fixture(scope="session")
def peers() -> Any:
    """The benchmarks' way to open_clip, which `make install-dev` installs."""
    spec = importlib.util.spec_from_file_location("peers", PEERS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
