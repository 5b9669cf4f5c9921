"""The training loop: next batch, encode, loss, backward, clip, step, log, checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from infra.errors import RunError
from infra.logs import log, progress
from infra.storage import Folder
from train import checkpoint
from train.accumulate import forward_backward
from train.augment import augment
from train.data import Batch
from train.evaluate.run import measure
from train.evaluate.suite import read_suite
from train.gradients import clip_gradients, zero_gradients
from train.log import TrainingLog
from train.optim import learning_rate
from train.parallel import any_rank, average_buffers, mean_over_ranks, rank, world_size
from train.precision import laid_out
from train.state import TrainingState
from train.tokenizer import load_tokenizer

NAMED_KEYS = 8
"""Keys of a batch named when its gradient is not finite."""


def fit(state: TrainingState, run: Path, is_stopped: Callable[[], bool]) -> dict[str, Any] | None:
    """Train to the end of the run; return its result, or None if it was asked to stop before.

    Args:
        state: the run, new or loaded from a checkpoint.
        run: its folder, for the log and the checkpoints.
        is_stopped: asked after each step; one rank's yes stops all, with a checkpoint.

    Raises:
        RunError: a gradient that is not finite; the message names the step and samples of the batch.
    """
    config = state.config
    every = state.steps_of(config.checkpoint.every)
    measured_every = state.steps_of(config.evaluate.every)
    saved_at, stopped = state.step, False
    state.parallel.train()
    with progress("train", state.total, "samples") as meter:
        meter.advance(state.samples)
        lines = TrainingLog(run, state, meter)
        started, before = time.monotonic(), state.seconds
        batches = iter(state.data)
        while state.samples < state.total and not stopped:
            numbers = train_step(state, next(batches))
            state.seconds = before + time.monotonic() - started
            lines.step(numbers)
            stopped = any_rank(is_stopped())
            if state.step % every == 0 or stopped:
                save(state, run)
                saved_at = state.step
            if config.evaluate.suite and state.step % measured_every == 0:
                lines.note({"zero_shot": zero_shot(state, run)})
        batches.close()  # type: ignore[attr-defined]
    if saved_at < state.step:
        save(state, run)
    if state.samples < state.total:
        return None
    kept = ("loss", "accuracy", "temperature", "samples_per_s", "memory_bytes")
    result = {"steps": state.step, "samples": state.samples, "seconds": round(state.seconds, 2)}
    return result | {name: lines.last[name] for name in kept if name in lines.last}


def train_step(state: TrainingState, batch: Batch) -> dict[str, float]:
    """Take one step of the optimiser on one batch; return this rank's numbers to log."""
    config = state.config.optim
    size = state.config.data.global_batch_size
    rate = learning_rate(config, state.samples + size // 2, state.samples_of(config.warmup), state.total)
    for group in state.optimizer.param_groups:
        group["lr"] = rate

    images = augment(batch.images.to(state.device), batch.numbers.to(state.device), state.config.augment)
    tokens = batch.tokens.to(state.device)
    loss, numbers = forward_backward(state, laid_out(images, state.config.parallel.channels_last), tokens)
    norm = clip_gradients(state.parameters(), config.clip_norm)
    if not math.isfinite(norm.item()):
        raise RunError(
            f"step {state.step}: the gradient is not finite (loss {loss.item()}); samples on rank {rank()}: "
            f"{', '.join(batch.keys[:NAMED_KEYS])}, ...; lower optim.learning_rate or look at them"
        )
    state.optimizer.step()
    zero_gradients(state.parameters())
    state.objective.constrain(state.model)
    average_buffers(state.model)
    if state.average is not None:
        state.average.update(state.model)
    state.step += 1
    state.samples += size
    return {
        "loss": loss.item(),
        **{name: value.item() for name, value in numbers.items()},
        "gradient_norm": norm.item(),
    }


def save(state: TrainingState, run: Path) -> None:
    """Write a checkpoint; every rank must call it."""
    content = state.state_dict()
    if rank() == 0:
        checkpoint.save(run / checkpoint.CHECKPOINTS, state.step, content, keep=state.config.checkpoint.keep)


def resumed(state: TrainingState, run: Path) -> TrainingState:
    """Take the newest sound checkpoint of the run, if there is one. Raises UserError for another model's."""
    content = checkpoint.load_newest(run / checkpoint.CHECKPOINTS)
    if content is not None:
        state.load_state_dict(content)
        if rank() == 0:
            log.info("train: going on after step %d", state.step)
    return state


def zero_shot(state: TrainingState, run: Path) -> float:
    """Return the top-1 accuracy of the weights as they are (or of their average) on the configured suite.

    Every rank must call it: each measures its share of the pictures, so none waits for the others for long.
    """
    averaged = state.average.applied_to(state.model) if state.average is not None else nullcontext()
    suite = read_suite(state.config.evaluate.suite)
    share = tuple(replace(example, caption=None) for example in suite.examples[rank() :: world_size()])
    right = 0.0
    if share:
        with averaged:
            result = measure(state.model, load_tokenizer(Folder(run)), replace(suite, examples=share), state.config)
        right = result["top1"] * len(share)
        state.parallel.train()
    return round(mean_over_ranks([right])[0] * world_size()) / len(suite.examples)
