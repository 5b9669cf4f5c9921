"""The peers that stream, trainer and dedup are measured beside, each in a folder of its own.

They would not share our environment. `make bench` puts them there; by hand it is one line, which is printed when a
peer is missing.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

WEBDATASET = "webdataset==1.0.2"
STREAMING = "mosaicml-streaming==0.13.0"
WEBDATASET_FOLDER = Path(sys.prefix) / "webdataset-1"
STREAMING_FOLDER = Path(sys.prefix) / "mosaicml-streaming"
OPEN_CLIP = "open_clip_torch==3.3.0"
OPEN_CLIP_FOLDER = Path(sys.prefix) / "open-clip"
IMAGEDEDUP = "imagededup==0.3.3.post2"
IMAGEDEDUP_FOLDER = Path(sys.prefix) / "imagededup"


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
    _empty_packages({"streaming": root, "streaming.base": root / "base"})
    shuffle: Callable[..., Any] = importlib.import_module("streaming.base.shuffle.py1e").get_shuffle_py1e
    return shuffle


def imagededup_phash(folder: Path) -> Any:
    """Return imagededup's `PHash`, loaded alone: the package itself imports a neural network and a plotter.

    An empty class stands for its search, which is not used.
    """
    root = found(folder, "imagededup", IMAGEDEDUP) / "imagededup"
    _empty_packages({"imagededup": root, "imagededup.methods": root / "methods", "imagededup.utils": root / "utils"})
    search = types.ModuleType("imagededup.handlers.search.retrieval")
    search.HashEval = type("HashEval", (), {})  # type: ignore[attr-defined]
    sys.modules[search.__name__] = search
    return importlib.import_module("imagededup.methods.hashing").PHash()


def _empty_packages(folders: dict[str, Path]) -> None:
    for name, path in folders.items():
        package = types.ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules[name] = package


def open_clip_class(folder: Path) -> Any:
    """Return open_clip's class `CLIP`; its module is loaded alone.

    Where torchvision is not installed, an empty class stands for the one thing that is taken from it, a frozen
    BatchNorm, which no model is built with.
    """
    root = found(folder, "open_clip", OPEN_CLIP) / "open_clip"
    if "open_clip" not in sys.modules:
        package = types.ModuleType("open_clip")
        package.__path__ = [str(root)]
        sys.modules["open_clip"] = package
        if importlib.util.find_spec("torchvision") is None:
            _import_without_torchvision("open_clip.utils")
    return importlib.import_module("open_clip.model").CLIP


def open_clip_model(folder: Path, name: str) -> Any:
    """Return open_clip's model of that name, its weights random."""
    file = found(folder, "open_clip", OPEN_CLIP) / "open_clip" / "model_configs" / f"{name}.json"
    return open_clip_class(folder)(**json.loads(file.read_text(encoding="utf-8")))


def _import_without_torchvision(module: str) -> None:
    names = ("torchvision", "torchvision.ops", "torchvision.ops.misc")
    sys.modules.update({name: types.ModuleType(name) for name in names})
    sys.modules[names[-1]].FrozenBatchNorm2d = type("FrozenBatchNorm2d", (), {})  # type: ignore[attr-defined]
    importlib.import_module(module)
    for name in names:
        del sys.modules[name]  # or others would take it for torchvision
