"""A trained model as a folder that other tools load: open_clip's or Hugging Face's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save

from infra.errors import UserError
from infra.storage import Folder
from train import checkpoint, huggingface, open_clip
from train.augment import MEAN, STD
from train.evaluate.run import load_model
from train.model import DualEncoder
from train.tokenizer import ClipTokenizer, Tokenizer
from train.tokenizer_files import tokenizer_files

Format = Literal["open_clip", "huggingface"]
METADATA = {"format": "pt"}
BICUBIC = 3
"""Pillow's number of that filter."""


def export(path: str | Path, kind: Format, out: str | Path) -> dict[str, Any]:
    """Write a run's newest checkpoint, or one named checkpoint, as a folder; averaged weights, if there are any.

    Args:
        path: folder of a run, or a checkpoint in it.
        kind: whose folder it becomes.
        out: the folder, any fsspec URL; it must be empty or not there, or hold what an interrupted export left.

    Returns:
        `out`, `format`, `files` (names), `parameters` (count), `step`.

    Raises:
        UserError: no checkpoint there, a folder that holds something else or is inside a run's, or a model that the
            format has no place for.
    """
    folder = Folder(out)
    _check_is_no_runs(folder, path)
    model, tokenizer, config, state = load_model(path)
    files = WRITERS[kind](model, tokenizer, model.image_size or config.data.image_size)
    before = list(files)[:-1]
    if folder.folders() or set(folder.names()) - set(before):
        raise UserError(f"{folder.url}: holds something already; give a new folder")
    folder.sweep_temporary()
    for name, data in files.items():  # the configuration comes last: what is there without it is no model yet
        folder.write(name, data)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"out": folder.url, "format": kind, "files": list(files), "parameters": parameters, "step": state["step"]}


def _check_is_no_runs(folder: Folder, path: str | Path) -> None:
    """Raise UserError if a folder for an export lies inside a run's, the exported one's or another, or under a file."""
    run, checkpoints = checkpoint.find(path)
    inside = [one.url for one in (run, checkpoints) if f"{folder.url}/".startswith(f"{one.url}/")]
    if folder.is_local:
        place = Path(folder.url)
        for above in (place, *place.parents):
            if above.is_file():
                raise UserError(f"{folder.url}: {above} is a file; give a new folder")
            if (above / "config.json").is_file() and (above / checkpoint.CHECKPOINTS).is_dir():
                inside.append(str(above))
    if inside:
        raise UserError(f"{folder.url}: lies inside a run, {inside[-1]}; give a new folder elsewhere")


def open_clip_files(model: DualEncoder, tokenizer: Tokenizer, side: int) -> dict[str, bytes]:
    """Return the files of a folder that open_clip takes as `local-dir:FOLDER`, its configuration last."""
    settings, words = open_clip.model_settings(model), {}
    if not isinstance(tokenizer, ClipTokenizer):
        words = tokenizer_files(tokenizer, model.context_length)
        settings["text_cfg"]["hf_tokenizer_name"] = "."  # with `local-dir:` its own folder is read
    pictures = {"size": side, "mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    return {
        "open_clip_model.safetensors": save(_contiguous(model), METADATA),
        **{name: text.encode() for name, text in words.items()},
        "open_clip_config.json": _json({"model_cfg": settings, "preprocess_cfg": pictures}),
    }


def huggingface_files(model: DualEncoder, tokenizer: Tokenizer, side: int) -> dict[str, bytes]:
    """Return the files of a folder that `CLIPModel.from_pretrained` (or `SiglipModel`) takes, `config.json` last."""
    pictures = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
    }
    return {
        "model.safetensors": save(huggingface.weights(model), METADATA),
        "preprocessor_config.json": _json(pictures),
        **{name: text.encode() for name, text in tokenizer_files(tokenizer, model.context_length).items()},
        "config.json": _json(huggingface.model_settings(model)),
    }


WRITERS: dict[str, Callable[[DualEncoder, Tokenizer, int], dict[str, bytes]]] = {
    "open_clip": open_clip_files,
    "huggingface": huggingface_files,
}


def _contiguous(model: DualEncoder) -> dict[str, Any]:
    return {name: value.contiguous() for name, value in model.state_dict().items()}


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode()
