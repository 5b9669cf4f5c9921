"""The peers that the stream is measured beside, each in a folder of its own: they would not share our environment.

`make bench` puts them there; by hand it is one line, which is printed when a peer is missing.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

WEBDATASET = "webdataset==1.0.2"
STREAMING = "mosaicml-streaming==0.13.0"
WEBDATASET_FOLDER = Path(sys.prefix) / "webdataset-1"
STREAMING_FOLDER = Path(sys.prefix) / "mosaicml-streaming"


def found(folder: Path, package: str, requirement: str) -> Path:
    """Return `folder` if `package` lies there; else end, saying how to get it."""
    if not (folder / package).is_dir():
        sys.exit(
            f"{folder}: no {requirement} here; get it with "
            f"`{sys.executable} -m pip install --no-deps --target {folder} {requirement}`"
        )
    return folder


def py1e(folder: Path) -> Callable[..., Any]:
    """Return Streaming's `get_shuffle_py1e`, loaded alone: the package itself imports the clients of every cloud."""
    root = found(folder, "streaming", STREAMING) / "streaming"
    for name, path in (("streaming", root), ("streaming.base", root / "base")):
        package = types.ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules[name] = package
    shuffle: Callable[..., Any] = importlib.import_module("streaming.base.shuffle.py1e").get_shuffle_py1e
    return shuffle
