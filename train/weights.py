"""Published weights: OpenAI's and open_clip's files, as tensors by name."""

from __future__ import annotations

import pickle
import struct
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
_UNREADABLE = (
    OSError, EOFError, RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError,
    ImportError, OverflowError, MemoryError, struct.error,
)  # fmt: skip
"""What readers of weights raise over a file that is not what its name says."""


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
    _check_state_dict(content, path)
    found: dict[str, Tensor] = {}
    for name, value in content.items():
        bare = name.removeprefix(WRAPPER)
        if bare in found:
            raise UserError(f"{path}: holds {bare} twice, with and without `{WRAPPER}` before it; save one of them")
        found[bare] = value
    return {name: value for name, value in found.items() if name not in NO_WEIGHTS}


def _check_state_dict(content: Any, path: Path) -> None:
    """Raise UserError unless it is a mapping of names to tensors that can be copied into parameters."""
    mend = "save `model.state_dict()`"
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no state dict, but {type(content).__name__}; {mend}")
    if not content:
        raise UserError(f"{path}: holds no tensors; {mend}")
    for name, value in content.items():
        if not isinstance(name, str):
            raise UserError(f"{path}: holds no state dict: {name!r} is {type(name).__name__}, and no name; {mend}")
        if not isinstance(value, Tensor):
            raise UserError(f"{path}: holds no state dict: {name} is {type(value).__name__}, and no tensor; {mend}")
        if value.layout != torch.strided or value.is_meta or value.is_quantized or value.is_complex():
            kind = f"{str(value.layout).removeprefix('torch.')}, {value.dtype}, on {value.device}"
            raise UserError(f"{path}: {name} is no plain tensor of numbers ({kind}); {mend} of a model in float")


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, *_UNREADABLE) as error:
        raise UserError(f"{path}: no sound safetensors file ({_in_a_line(error)})") from None


def _saved(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, *_UNREADABLE) as error:
        raise UserError(
            f"{path}: not read, since it holds more than tensors or is damaged ({_in_a_line(error)}); "
            "save its state dict anew where you trust it"
        ) from None


def _in_a_line(error: BaseException) -> str:
    words = str(error).strip().splitlines()
    return words[0] if words else repr(error)
