"""Published weights: OpenAI's and open_clip's files, as tensors by name."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from infra.errors import UserError
from train.checkpoint import load_weights
from train.model import DualEncoder

NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size")
"""Numbers that OpenAI's state dicts hold beside the weights."""
WRAPPER = "module."
"""What data parallelism put before every name."""


def load_published(model: DualEncoder, path: str | Path) -> None:
    """Put the weights of a file into a model, every tensor of it; half precision is widened.

    Args:
        model: of the same name as the weights'.
        path: `.safetensors`, or what `torch.save` made of a state dict or of a checkpoint of open_clip's trainer.

    Raises:
        UserError: no such file, one that holds something else than tensors, or another model's weights.
    """
    load_weights(model, read_weights(path), str(path))


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a file by their names in the model. Raises UserError as `load_published`."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file of weights")
    content = _safetensors(path) if path.suffix == ".safetensors" else _saved(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path}: holds no state dict, but {type(content).__name__}; save `model.state_dict()`")
    names = {name: name.removeprefix(WRAPPER) for name in content}
    return {bare: content[name] for name, bare in names.items() if bare not in NO_WEIGHTS}


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: no sound safetensors file ({error})") from None


def _saved(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{path}: not read, since it holds more than tensors or is damaged ({reason[0] if reason else error!r}); "
            "save its state dict anew where you trust it"
        ) from None
