"""Whether what a run writes outside its folder can be written there, tried before it starts."""

from __future__ import annotations

import secrets
from pathlib import Path

from infra.errors import UserError
from infra.storage import Folder
from train.config import CheckpointConfig, DataConfig

_REFUSALS = (FileNotFoundError, PermissionError)
"""What an object store answers that is there: no such bucket, or none of yours."""


def check_checkpoint_folder(config: CheckpointConfig) -> None:
    """Raise UserError where `checkpoint.folder` is a file, or nothing can be written to it."""
    if config.folder:
        _check(config.folder, "checkpoint.folder")


def check_stream_cache(config: DataConfig) -> None:
    """Raise UserError where `data.stream_cache` is no local folder, or nothing can be written to it."""
    if "://" in config.stream_cache:
        raise UserError(f"data.stream_cache: {config.stream_cache} is no local folder; name one, or leave it out")
    if config.stream_cache:
        _check(str(Path(config.stream_cache)), "data.stream_cache")


def _check(url: str, option: str) -> None:
    folder, name = Folder(url), f"write-test-{secrets.token_hex(4)}"
    try:
        folder.exists()  # a store that is away says so here, where a write would wait for it
        folder.write(name, b"")
        folder.delete(name)
    except OSError as error:
        if not (folder.is_local or isinstance(error, _REFUSALS)):
            raise
        why = error.strerror or " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{option}: {url} cannot be written to ({why}); name a folder that can") from None
