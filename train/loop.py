"""The training loop: next batch, encode, loss, backward, clip, step, log, checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infra.logs import log, progress
from train import checkpoint
from train.accumulate import forward_backward
from train.augment import DRAWS, augment
from train.collectives import Vote
from train.data import Batch
from train.evaluate.together import Measurement
from train.gradients import clip_gradients, zero_gradients
from train.heartbeat import Heartbeat
from train.log import TrainingLog
from train.optim import learning_rate
from train.parallel import average_buffers, rank
from train.precision import laid_out
from train.state import TrainingState
from train.towers.vit import kept_patches


def fit(state: TrainingState, run: Path, is_stopped: Callable[[], bool]) -> dict[str, Any] | None:
    """Train to the end of the run; return its result, or None if it was asked to stop before.

    Args:
        state: the run, new or loaded from a checkpoint.
        run: its folder, for the log and the checkpoints.
        is_stopped: asked at the end of each step; one rank's yes stops all, with a checkpoint.

    Raises:
        RunError: a bad step that is not to be dropped (the message names it and samples of the batch), or a
            checkpoint that cannot be written.
    """
    config = state.config
    measured_every = state.steps_of(config.evaluate.every)
    measure, stopped = Measurement(state, run), False
    state.parallel.train()
    with (
        progress("train", state.total, "samples") as meter,
        checkpoint.Saver(state, run) as saver,
        TrainingLog(run, state, meter) as lines,
        Heartbeat(lambda: state.step, run, config.log.stall_s) as beats,
    ):
        meter.advance(state.samples)
        state.guard.take_back(state.step)
        if state.changed:
            lines.note({"note": f"goes on under a changed configuration: {'; '.join(state.changed)}"})
        vote = Vote(is_stopped, saver.is_due)
        started, before = time.monotonic(), state.seconds
        batches = iter(state.data)
        while state.samples < state.total and not stopped:
            batch = next(batches)
            lines.shape = (batch.images.shape[-1], batch.tokens.shape[-1])
            numbers = train_step(state, batch, vote)
            state.seconds = before + time.monotonic() - started
            lines.step(numbers, saver.pause_s)
            stopped, due = vote.answers
            if config.evaluate.suite and state.step % measured_every == 0:
                saver.copied()  # the average takes the place of the weights for a while
                with lines.clock.measuring(), beats.at_length():
                    found = measure()
                lines.note(found)
            if state.step % saver.every == 0 or due or stopped:
                saver.save()
            saver.check()
        batches.close()  # type: ignore[attr-defined]
        if saver.saved_step < state.step:
            saver.save()
    return _result(state) if state.samples >= state.total else None


def _result(state: TrainingState) -> dict[str, Any]:
    kept = ("loss", "accuracy", "temperature", "samples_per_s", "memory_bytes")
    result = {"steps": state.step, "samples": state.samples, "seconds": round(state.seconds, 2)}
    return result | {name: state.metrics[name] for name in kept if name in state.metrics}


def train_step(state: TrainingState, batch: Batch, vote: Vote | None = None) -> dict[str, float]:
    """Take one step of the optimiser on one batch; return this rank's numbers to log, none if it was dropped.

    The device is waited for once, and `vote`, the step counted already, is the one message of its own kind.
    """
    config = state.config.optim
    size = state.config.data.global_batch_size
    lengths = {name: state.samples_of(length) for name, length in (("warmup", config.warmup), ("decay", config.decay))}
    rate = learning_rate(config, state.samples + size // 2, total=state.total, **lengths)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.guard.begin(state.model)

    draws = batch.numbers.to(state.device)
    images = augment(batch.images.to(state.device), draws, state.config.augment)
    tokens = batch.tokens.to(state.device)
    kept = kept_patches(draws[:, DRAWS:], state.config.model.patch_dropout) if state.model.patch_draws else None
    loss, numbers = forward_backward(state, laid_out(images, state.config.parallel.channels_last), tokens, kept)
    norm = clip_gradients(state.parameters(), config.clip_norm)
    logged = _fetched({"loss": loss, **numbers, "gradient_norm": norm})

    state.step += 1
    state.samples += size
    fault = state.guard.fault((vote or Vote()).take(logged["loss"]), logged["gradient_norm"])
    if fault:
        state.guard.drop(fault, state.step - 1, logged["loss"], logged["gradient_norm"], batch.keys)
        logged = {}
    else:
        state.guard.accept()
        state.optimizer.step()
        state.objective.constrain(state.model)
        average_buffers(state.model)
        if state.average is not None:
            state.average.update(state.model)
    zero_gradients(state.parameters())
    return logged


def _fetched(scalars: dict[str, Tensor]) -> dict[str, float]:
    """Return scalars of the device as numbers, all in one transfer."""
    place = scalars["loss"].device
    values = torch.stack([value.detach().to(place, torch.float64) for value in scalars.values()])
    return dict(zip(scalars, values.tolist(), strict=True))


def resumed(state: TrainingState, run: Path) -> TrainingState:
    """Take the newest sound checkpoint of the run, if there is one. Raises UserError for another model's."""
    folder = checkpoint.claim(state.config, run) if rank() == 0 else checkpoint.place(state.config, run)
    meta, state.torn = checkpoint.restore(folder, state.targets)
    if meta is not None:
        state.load_state_dict(meta.values)
        if rank() == 0:
            log.info("train: going on after step %d", state.step)
    return state
