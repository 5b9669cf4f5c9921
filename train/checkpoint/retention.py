"""Which checkpoints remain."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from infra.logs import log
from infra.storage import Folder
from train.checkpoint.layout import META, begun


def kept(steps: Iterable[int], newest: int, every: int = 0) -> set[int]:
    """Return which steps remain: the `newest`, and for ever the first at or after each multiple of `every`.

    Args:
        steps: steps that a checkpoint was taken after.
        newest: how many of the newest remain.
        every: steps; 0: none remains for ever.
    """
    ordered = sorted(set(steps))
    stay = set(ordered[-newest:]) if newest else set()
    if every:
        stay |= set({step // every: step for step in reversed(ordered) if step >= every}.values())
    return stay


def prune(folder: Folder, step: int, newest: int, every: int = 0, torn: Collection[int] = ()) -> None:
    """Remove what does not remain once the checkpoint of `step` is written.

    Those `torn` go, which the run passed over when it was resumed: it takes their steps anew, and that of `step` is
    whole by now. No other of a later step goes, since someone else wrote it.
    """
    every_one, faulty = begun(folder), set(torn) - {step}
    before = [one for one in every_one if one.step <= step and one.step not in faulty]
    whole = [one for one in before if Folder(one.path).exists(META)]
    stay = kept([one.step for one in whole], newest, every)
    for one in every_one:
        if one.step in stay:
            continue
        if one.step > step and one.step not in faulty:
            continue
        if one.step in faulty:
            log.warning("%s: removed, it is torn and its steps are taken again", one.path)
        try:
            _remove(Folder(one.path))
        except OSError as error:
            if one.step not in faulty:
                raise
            log.warning("%s: cannot be removed, do it by hand: %s", one.path, error)


def _remove(place: Folder) -> None:
    # Its commit first, so that one half removed is none; of a torn one that may be a folder.
    if not (place.is_local and Path(place.path(META)).is_dir()):
        place.delete(META)
    place.delete_tree()
