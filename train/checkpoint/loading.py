"""Reads checkpoints: whole into memory, or straight into the tensors of a run, whatever the world size was."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from infra.errors import RunError
from infra.logs import log
from infra.storage import Folder
from train.checkpoint.layout import Meta, Saved, TornCheckpointError, nested, saved
from train.checkpoint.storage import CheckpointReader
from train.parallel import any_rank, rank, world_size

PASSED_OVER = "checkpoint passed over, going back to the one before: %s"
# Nobody needs to be told that a single process is one.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)


def load(path: str | os.PathLike[str], tables: Collection[str] = ()) -> dict[str, Any]:
    """Read one checkpoint into memory.

    Args:
        path: its folder, any fsspec URL.
        tables: which groups of tensors to read (`model`, `average`, `optimizer`, `random`); empty: all.

    Returns:
        its values (`step`, `samples`, `seconds`, `data`, ...), and tables of tensors by name.

    Raises:
        TornCheckpointError: a file is missing, or is not what was written.
    """
    one = Saved(Folder(path).url, 0)
    meta = one.meta()
    reader = CheckpointReader(Folder(path), meta)
    wanted = [name for name in meta.tensors if not tables or name.partition(".")[0] in tables]
    return nested({name: reader.tensor(name) for name in wanted}, meta.values)


def load_newest(folder: Folder | str | os.PathLike[str], tables: Collection[str] = ()) -> dict[str, Any] | None:
    """Read the newest sound checkpoint below `folder` into memory; None if there is none at all.

    A torn one is passed over with a warning, for the one before it.

    Raises:
        RunError: there are checkpoints, and every one of them is torn.
    """
    candidates = saved(folder)
    for candidate in reversed(candidates):
        try:
            return load(candidate.path, tables)
        except TornCheckpointError as error:
            log.warning(PASSED_OVER, error)
    if candidates:
        raise _none_is_sound(folder, len(candidates))
    return None


def restore(folder: Folder, targets: Callable[[Meta, str], dict[str, Tensor]]) -> tuple[Meta | None, set[int]]:
    """Read the newest sound checkpoint below `folder` into tensors of this rank; every rank must call it.

    Args:
        folder: where the run keeps its checkpoints.
        targets: given what a checkpoint holds and its name, returns the tensors to fill, by their names there; whole
            ones or shards of any mesh. It may refuse with a UserError, or a TornCheckpointError for what is missing.

    Returns:
        what the checkpoint holds, or None if there is none at all; and the steps of those found torn.

    Raises:
        RunError: there are checkpoints, and every one of them is torn.
    """
    candidates = _as_rank_0(saved(folder) if rank() == 0 else [])
    torn: set[int] = set()
    for candidate in reversed(candidates):
        fault: TornCheckpointError | None = None
        try:
            meta = candidate.meta()
        except TornCheckpointError as error:
            fault = error
        if not any_rank(fault is not None):
            try:
                tensors = targets(meta, candidate.path)
            except TornCheckpointError as error:  # the same on every rank, as what it was judged by is
                fault = error
            else:
                fault = _fill(tensors, CheckpointReader(Folder(candidate.path), meta))
            if fault is None:
                return meta, torn
        torn.add(candidate.step)
        if rank() == 0 or fault is not None:
            log.warning(PASSED_OVER, fault or candidate.path)
    if candidates:
        raise _none_is_sound(folder, len(candidates))
    return None, torn


def _fill(tensors: dict[str, Tensor], reader: CheckpointReader) -> TornCheckpointError | None:
    """Read into the tensors; return what is wrong with the checkpoint, the same on every rank, or None."""
    try:
        dcp.load(nested(tensors, {}), storage_reader=reader, no_dist=world_size() == 1)
    except CheckpointException as error:
        torn = cause(error)
        if isinstance(torn, TornCheckpointError):
            return torn
        raise torn from error
    return None


def cause(error: CheckpointException) -> BaseException:
    """Return what went wrong on the first rank on which something did."""
    return error.failures[min(error.failures)][0]


def _as_rank_0(found: list[Saved]) -> list[Saved]:
    if world_size() == 1:
        return found
    # Other machines may see a shared folder's newest entries later.
    told = [[(one.path, one.step) for one in found]]
    dist.broadcast_object_list(told)
    return [Saved(*one) for one in told[0]]


def _none_is_sound(folder: Folder | str | os.PathLike[str], count: int) -> RunError:
    where = folder.url if isinstance(folder, Folder) else os.fspath(folder)
    return RunError(f"{where}: none of its {count} checkpoints is sound; remove the folder to start anew")
