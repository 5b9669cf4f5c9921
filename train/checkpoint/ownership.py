"""Whose checkpoints a folder outside of the run's own holds: an id in both says so, not the place of either."""

from __future__ import annotations

import os
import secrets
import socket

from pydantic import Field

from infra.config import Config, differences, essence, parse
from infra.errors import UserError
from infra.storage import Folder
from train.changes import changeable, changes
from train.checkpoint.layout import COMPANIONS, begun, place
from train.config import RunConfig

IDENTITY = "identity.json"


class Identity(Config):
    """`identity.json`, in a run's folder and where it keeps its checkpoints."""

    id: str = Field(min_length=1, description="drawn when the run first needs it")
    run: str = Field(description="the run's folder when it was started last, for people")
    host: str = Field(description="the machine that was on, for people")


def claim(config: RunConfig, run: str | os.PathLike[str]) -> Folder:
    """Return `place`; kept elsewhere, with the run's identity, configuration and vocabulary beside the checkpoints.

    Raises:
        UserError: another run keeps its checkpoints there, or nothing says whose they are.
    """
    folder, own = place(config, run), Folder(run)
    if not config.checkpoint.folder:
        return folder
    known = _identity(own)
    mine = Identity(id=known.id if known else secrets.token_hex(16), run=own.url, host=socket.gethostname())
    if known is None:
        own.write_json(IDENTITY, mine.model_dump())
    _check_is_of(mine, folder)
    _check_is_like(config, folder)
    folder.write_json(IDENTITY, mine.model_dump())
    for name in reversed(COMPANIONS):
        folder.write(name, own.read(name))
    return folder


def _check_is_of(mine: Identity, folder: Folder) -> None:
    theirs = _identity(folder)
    if theirs is None and (folder.exists(COMPANIONS[0]) or begun(folder)):
        raise UserError(
            f"checkpoint.folder: {folder.url} holds checkpoints or a run, and no {IDENTITY} that says whose; "
            f"name a folder of this run's own, or copy {mine.run}/{IDENTITY} there if they are this run's"
        )
    if theirs is not None and theirs.id != mine.id:
        raise UserError(
            f"checkpoint.folder: {folder.url} holds checkpoints of another run ({theirs.run} on {theirs.host}); "
            f"name a folder of this run's own, or, if that one is lost, copy {IDENTITY} from there to {mine.run}"
        )


def _check_is_like(config: RunConfig, folder: Folder) -> None:
    """Refuse what the run itself would refuse, whatever was asked for: a kill may have come between two writes."""
    name = COMPANIONS[0]
    if not (folder.exists(name) and begun(folder)):  # before a step, a configuration binds nobody
        return
    there = parse(folder.read_json(name), RunConfig, source=folder.path(name))
    allowed = changes(changeable(there), config)
    fixed = [one for one in differences(essence(there), essence(config)) if one not in allowed]
    if fixed:
        raise UserError(
            f"checkpoint.folder: {folder.url} holds checkpoints of this run under another configuration "
            f"({'; '.join(fixed[:4])}); name a new folder"
        )


def _identity(folder: Folder) -> Identity | None:
    if not folder.exists(IDENTITY):
        return None
    return parse(folder.read_json(IDENTITY), Identity, source=folder.path(IDENTITY))
