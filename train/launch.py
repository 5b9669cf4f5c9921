"""Starts a training run: what it is checked for, its folder, and who starts its processes."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infra.config import differences, essence, parse
from infra.errors import RunError, UserError
from infra.lock import LOCK_NAME, exclusive
from infra.logs import log
from infra.storage import Folder
from train.changes import check_same_run
from train.checkpoint import place, saved
from train.config import RunConfig, written_down
from train.data import captions, open_stream
from train.environment import told
from train.evaluate.suite import check_suite
from train.length import in_samples
from train.model import check_image_size, create_model
from train.models import sizes_of
from train.objectives import check_needs, create_objective
from train.objectives.captioning import CaptioningObjective
from train.objectives.clip import MAX_LOGIT_SCALE, ClipObjective
from train.ranks import Ranks
from train.sinks.jsonl import LOG_NAME
from train.statistics import smallest_grid
from train.tokenizer import TOKENIZER_NAME, create_tokenizer
from train.worker import CONFIG_NAME, RESULT_NAME, run_rank
from train.writable import check_checkpoint_folder

POLL_S = 0.05
WARN_AFTER_S = 10.0
"""Seconds that a rank waits for rank 0 without a word."""
_EARLY = (LOCK_NAME, TOKENIZER_NAME)
"""What a run's folder may hold before its configuration, of one that was interrupted so early."""

Launcher = Callable[[RunConfig, Path, int], None]
"""Runs a prepared folder's ranks, so many of them, until its result is there."""


def on_this_machine(config: RunConfig, run: Path, nproc: int) -> None:
    """Run the ranks as processes here; see `Ranks.wait` for what it raises."""
    Ranks(run, nproc).wait()


def train(
    config: RunConfig,
    run: str | Path,
    nproc: int = 1,
    launcher: Launcher = on_this_machine,
    *,
    may_change: bool = False,
) -> dict[str, Any]:
    """Train in the folder `run`, going on from its newest checkpoint; a finished run is left as it is.

    Under torchrun's environment (`WORLD_SIZE` set) this process is one rank; otherwise `launcher` starts `nproc`.

    Args:
        config: the run.
        run: local folder for `config.json`, `tokenizer.json`, `log.jsonl`, `checkpoints/` and `result.json`.
        nproc: number of ranks.
        launcher: what starts them.
        may_change: a run that was begun under other values of `train.changes.CHANGEABLE` goes on under these.

    Returns:
        `steps`, `samples`, `seconds`, and the last log line's `loss`, `accuracy`, `temperature`,
        `samples_per_s` and `memory_bytes`.

    Raises:
        UserError: a batch, corpus, name or folder that does not work out, or another process on this run.
        RunError: a rank died, or the run was stopped by a signal before its end.
        KeyboardInterrupt: Ctrl-C, after a checkpoint has been written.
    """
    run = local_run(run)
    started = told()
    if started is not None:
        if launcher is not on_this_machine:
            raise UserError("--launcher ray: this process is a rank of torchrun's already; start it without torchrun")
        return _as_rank(config, run, started.world_size, may_change)
    if nproc < 1:
        raise UserError(f"nproc: {nproc} processes; start at least 1")
    _check_is_a_run(Folder(run))
    with exclusive(Folder(run)):
        done = prepare(config, run, nproc, may_change=may_change)
        if done is None:
            launcher(config, run, nproc)
            done = Folder(run).read_json(RESULT_NAME)
    return dict(done)


def local_run(run: str | Path) -> Path:
    """Return a run's folder as a path. Raises UserError for a URL: what is written line by line needs a local disk."""
    # A path has lost one of the slashes.
    if re.match(r"[a-z][a-z0-9+.-]*:/", os.fspath(run)):
        raise UserError(
            f"--run {os.fspath(run)}: a run's folder is a local one; name one, and the URL as checkpoint.folder, "
            "where the checkpoints go"
        )
    return Path(run)


def prepare(config: RunConfig, run: Path, world_size: int, *, may_change: bool = False) -> dict[str, Any] | None:
    """Check the configuration and write the run's folder; return the result if it is finished already.

    `may_change` as in `train`.

    Raises:
        UserError: something in the configuration does not work out, or the folder holds another run.
    """
    folder = Folder(run)
    _check_is_a_run(folder)
    before = None
    if folder.exists(CONFIG_NAME):
        before = parse(folder.read_json(CONFIG_NAME), RunConfig, source=folder.path(CONFIG_NAME))
        if _has_begun(before, config, run):
            check_same_run(before, config, str(run), may_change=may_change)
        else:
            _take_back(before, config, folder)
    if folder.exists(RESULT_NAME):
        return dict(folder.read_json(RESULT_NAME))
    stream = open_stream(config.data, 0, world_size)
    stream.check_workers(config.data.workers)
    _check_length(config, stream.steps_per_epoch)
    check_checkpoint_folder(config.checkpoint)
    if config.model.weights and not Path(config.model.weights).is_file() and not saved(place(config, run)):
        raise UserError(f"model.weights: {config.model.weights}: no such file of weights; name one, or leave it out")
    check_groups(config, world_size)
    check_needs(config.objective.name, create_objective(**config.objective.model_dump()), config.model)
    if before is None or differences(essence(before), essence(config)):  # a run that was begun may go on as it did
        _check_temperature(config)
        _check_schedule(config, stream.steps_per_epoch)
    suite = config.evaluate.suite
    if suite:
        # Its pictures were all decoded at the run's first start.
        check_suite(suite, decode=before is None or before.evaluate.suite != suite)
    _check_sides(config)
    if before is None:
        folder.delete(TOKENIZER_NAME)  # nothing says whose it is
    folder.write_json(CONFIG_NAME, written_down(config))
    if not folder.exists(TOKENIZER_NAME):
        create_tokenizer(config.tokenizer, captions(config.data.folder, config.data.caption_limit)).save(folder)
    return None


def _check_is_a_run(folder: Folder) -> None:
    if folder.exists(CONFIG_NAME) or not [name for name in folder.names() + folder.folders() if name not in _EARLY]:
        return
    raise UserError(f"{folder.url}: holds something that is no training run; take a new folder")


def _has_begun(before: RunConfig, config: RunConfig, run: Path) -> bool:
    """Tell whether a step of a run was kept or told: before that, its configuration binds nobody."""
    told_of = (run / LOG_NAME).exists() and (run / LOG_NAME).stat().st_size > 0
    return told_of or (run / RESULT_NAME).exists() or any(saved(place(one, run)) for one in (before, config))


def _take_back(before: RunConfig, config: RunConfig, folder: Folder) -> None:
    """Let a run that never took a step be another one: the mistake that ended it may be in its configuration."""
    found = differences(essence(before), essence(config))
    if found:
        log.info("train: %s: its run took no step; it begins with %s", folder.url, "; ".join(found[:4]))
        folder.delete(TOKENIZER_NAME)


def _check_length(config: RunConfig, steps_per_epoch: int) -> None:
    batch = config.data.global_batch_size
    if in_samples(config.length, batch=batch, epoch=steps_per_epoch * batch) < batch:
        raise UserError(f"length: {config.length!r} is less than one step of {batch} samples; give '1 steps' or more")


def _check_temperature(config: RunConfig) -> None:
    objective, least = create_objective(**config.objective.model_dump()), 1 / MAX_LOGIT_SCALE
    given = sizes_of(config.model).temperature
    if isinstance(objective, ClipObjective | CaptioningObjective) and given < least:
        raise UserError(
            f"model.temperature: {given}, but {config.objective.name!r} keeps it at {least} or more; "
            f"take {least} or a larger one"
        )


def _check_schedule(config: RunConfig, steps_per_epoch: int) -> None:
    batch, optim = config.data.global_batch_size, config.optim
    epoch = steps_per_epoch * batch
    total = in_samples(config.length, batch=batch, epoch=epoch)
    warmup, decay = (
        in_samples(length, batch=batch, epoch=epoch, whole=total) for length in (optim.warmup, optim.decay)
    )
    if optim.schedule == "wsd" and warmup + decay > total + 1:  # two shares may each be rounded up
        raise UserError(
            f"optim.decay: {optim.decay!r}, with optim.warmup {optim.warmup!r}, is longer than the run "
            f"({config.length!r}); shorten one of them"
        )
    if warmup > total:
        log.warning(
            "optim.warmup: %r is longer than the run (%r), so it never reaches its learning rate; shorten it",
            optim.warmup, config.length,
        )  # fmt: skip


def check_groups(config: RunConfig, world_size: int) -> None:
    """Raise UserError where ranks' shares of a batch would cut groups of its statistics, or leave one value to take."""
    model = sizes_of(config.model)
    group = model.vision.statistics_group or model.statistics_group
    option = "model.vision.statistics_group" if model.vision.statistics_group else "model.statistics_group"
    local = config.data.global_batch_size // world_size
    if group and local % group:
        raise UserError(
            f"{option}: {group} samples do not divide a rank's {local} "
            f"(batch {config.data.global_batch_size} over {world_size}); take a divisor of {local}"
        )
    if (group or local) == 1 and _is_one_value_normalised(config):
        whole = f"{config.data.global_batch_size} samples over {world_size} ranks are 1 for each"
        where, mend = (
            (option, "take 2 or more") if local > 1 else ("data.global_batch_size", f"{whole}: take fewer ranks")
        )
        raise UserError(
            f"{where}: the image tower ends at one value a channel of a picture, and 1 sample has no spread; {mend}"
        )


def _is_one_value_normalised(config: RunConfig) -> bool:
    model = create_model(config.model, device="meta")
    side = model.image_size or config.data.early_image_size or config.data.image_size
    return smallest_grid(model.visual, side) == 1


def _check_sides(config: RunConfig) -> None:
    model = create_model(config.model, device="meta")
    check_image_size(model, config.data.image_size, "data.image_size")
    if config.data.early_image_size:
        check_image_size(model, config.data.early_image_size, "data.early_image_size")


def leads() -> bool:
    """Tell whether this process speaks for the run: under torchrun rank 0 does, without it the launcher."""
    started = told()
    return started is None or started.rank == 0


def _as_rank(config: RunConfig, run: Path, world_size: int, may_change: bool) -> dict[str, Any]:
    """Be one rank of torchrun's; rank 0 holds the run's folder for all of them."""
    if not leads():
        return _trained(_prepared(config, run, may_change) or run_rank(config, run), run)
    _check_is_a_run(Folder(run))
    with exclusive(Folder(run)):
        return _trained(prepare(config, run, world_size, may_change=may_change) or run_rank(config, run), run)


def _trained(result: dict[str, Any] | None, run: Path) -> dict[str, Any]:
    if result is None:
        raise RunError(f"{run}: stopped by a signal, its checkpoint is written; run the same command to go on")
    return result


def _prepared(config: RunConfig, run: Path, may_change: bool) -> dict[str, Any] | None:
    """Wait until rank 0 has written the folder; torchrun ends this rank if that one fails.

    Raises:
        UserError: after `parallel.timeout_s` it holds another configuration still.
        RunError: after that time it holds none.
    """
    folder, started, warned = Folder(run), time.monotonic(), False
    while not _is_ready(folder, config, may_change):
        waited_s = time.monotonic() - started
        if waited_s > config.parallel.timeout_s:
            if folder.exists(CONFIG_NAME):
                raise UserError(f"{run}: holds a run of another configuration; take a new folder")
            raise RunError(
                f"{folder.path(CONFIG_NAME)}: not written by rank 0 in {waited_s:.0f} s (parallel.timeout_s); "
                "take a folder that all nodes share"
            )
        if waited_s > WARN_AFTER_S and not warned:
            warned = True
            log.warning(
                "train: waiting for rank 0 to write %s; is the folder shared by all nodes?", folder.path(CONFIG_NAME)
            )
        time.sleep(POLL_S)
    return dict(folder.read_json(RESULT_NAME)) if folder.exists(RESULT_NAME) else None


def _is_ready(folder: Folder, config: RunConfig, may_change: bool) -> bool:
    if not (folder.exists(CONFIG_NAME) and folder.exists(TOKENIZER_NAME)):
        return False
    there = parse(folder.read_json(CONFIG_NAME), RunConfig, source=folder.path(CONFIG_NAME))
    return essence(there) == essence(config) or (may_change and folder.exists(RESULT_NAME))
