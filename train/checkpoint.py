"""A run's state on disk: whole or not there, and checked when it is read.

A checkpoint is a folder `step-00000120/` with `state.pt` (tensors and plain values, read with `weights_only`)
and `meta.json` (step, size and digest of the state), written under a temporary name and renamed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infra.errors import RunError, UserError
from infra.logs import log
from infra.storage import TEMPORARY_PREFIX, full_disk_is_named

CHECKPOINTS, STATE, META = "checkpoints", "state.pt", "meta.json"
PREFIX = "step-"
NAMED_TENSORS = 4
"""Tensors that an error about another model names."""


class TornCheckpointError(RunError):
    """A checkpoint that is not what was written; the message says what is wrong with it."""


@dataclass(frozen=True)
class Saved:
    """One checkpoint: its folder and the step after which it was taken."""

    path: Path
    step: int


def saved(folder: Path) -> list[Saved]:
    """Return the checkpoints below `folder`, oldest first; temporary ones are not among them."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.name.startswith(PREFIX) and path.is_dir()]
    return sorted((Saved(path, int(path.name.removeprefix(PREFIX))) for path in found), key=lambda one: one.step)


def save(folder: Path, step: int, state: dict[str, Any], *, keep: int) -> Path:
    """Write a checkpoint and remove all but the newest `keep`.

    Args:
        folder: where the run keeps its checkpoints.
        step: steps taken so far.
        state: nested dictionaries and lists of tensors, numbers and strings.
        keep: how many remain.

    Raises:
        RunError: the disk is full.
    """
    final = folder / f"{PREFIX}{step:08d}"
    temporary = folder / f"{TEMPORARY_PREFIX}{final.name}"
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    meta = {"step": step, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with full_disk_is_named(str(final)):
            temporary.mkdir(parents=True)
            _write(temporary / STATE, data)
            _write(temporary / META, json.dumps(meta).encode())
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # what a full disk has no room for
    for old in saved(folder)[:-keep]:
        shutil.rmtree(old.path)
    return final


def load(path: Path) -> dict[str, Any]:
    """Read one checkpoint.

    Raises:
        TornCheckpointError: a file is missing, or is not what was written.
    """
    try:
        meta = json.loads((path / META).read_bytes())
        data = (path / STATE).read_bytes()
    except (OSError, ValueError) as error:
        raise TornCheckpointError(f"{path}: incomplete ({error})") from None
    if len(data) != meta.get("bytes") or hashlib.sha256(data).hexdigest() != meta.get("sha256"):
        raise TornCheckpointError(f"{path / STATE}: {len(data)} bytes that are not those written")
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise TornCheckpointError(f"{path / STATE}: {str(error).splitlines()[0]}") from None
    return state


def load_newest(folder: Path) -> dict[str, Any] | None:
    """Read the newest sound checkpoint below `folder`; None if there is none at all.

    A torn one is passed over with a warning, for the one before it.

    Raises:
        RunError: there are checkpoints, and every one of them is torn.
    """
    candidates = saved(folder)
    for candidate in reversed(candidates):
        try:
            return load(candidate.path)
        except TornCheckpointError as error:
            log.warning("checkpoint passed over, going back to the one before: %s", error)
    if candidates:
        raise RunError(f"{folder}: none of its {len(candidates)} checkpoints is sound; remove the folder to start anew")
    return None


def find(path: str | Path) -> tuple[Path, Path]:
    """Return (run folder, checkpoints folder or one checkpoint) for a run folder or a checkpoint of one.

    Raises:
        UserError: nothing there, or neither a run nor a checkpoint.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give the folder of a run of `pairmill train`, or a checkpoint in it")
    if path.name.startswith(PREFIX) and (path / META).exists():
        return path.parent.parent, path
    if path.name == CHECKPOINTS and saved(path):
        return path.parent, path
    if saved(path / CHECKPOINTS):
        return path, path / CHECKPOINTS
    raise UserError(f"{path}: holds no checkpoint; give the folder of a run that has got as far as its first one")


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Put weights into a model, every tensor of it.

    Raises:
        UserError: they belong to another model; the message names tensors that differ.
    """
    expected = model.state_dict()
    problems = [f"{name} is missing" for name in expected.keys() - weights.keys()]
    problems += [f"{name} is unknown" for name in weights.keys() - expected.keys()]
    for name in expected.keys() & weights.keys():
        there, here = list(weights[name].shape), list(expected[name].shape)
        if there != here:
            problems.append(f"{name} is {there} there, {here} here")
    if problems:
        shown = "; ".join(sorted(problems)[:NAMED_TENSORS])
        more = f"; and {len(problems) - NAMED_TENSORS} more" if len(problems) > NAMED_TENSORS else ""
        raise UserError(f"{source}: a checkpoint of another model: {shown}{more}")
    model.load_state_dict(weights)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
