"""A run's state on disk, through torch.distributed.checkpoint: whole or not there, checked, and no pickle in it."""

from train.checkpoint.layout import (
    CHECKPOINTS,
    META,
    PREFIX,
    Meta,
    Saved,
    TornCheckpointError,
    find,
    place,
    saved,
)
from train.checkpoint.loading import load, load_newest, restore
from train.checkpoint.ownership import claim
from train.checkpoint.saver import Saver
from train.checkpoint.weights import load_weights

__all__ = [
    "CHECKPOINTS",
    "META",
    "PREFIX",
    "Meta",
    "Saved",
    "Saver",
    "TornCheckpointError",
    "claim",
    "find",
    "load",
    "load_newest",
    "load_weights",
    "place",
    "restore",
    "saved",
]
