"""Saves a run while it goes on: the loop waits for a copy in memory at most, never for a disk."""

from __future__ import annotations

import time
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

from infra.errors import RunError
from infra.logs import log
from infra.storage import TEMPORARY_PREFIX
from train.bad_steps import BadStepError
from train.checkpoint.layout import PREFIX, nested, place
from train.checkpoint.loading import cause
from train.checkpoint.retention import prune
from train.checkpoint.storage import CheckpointWriter
from train.parallel import rank, world_size

if TYPE_CHECKING:
    from train.state import TrainingState

warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)


class Saver:
    """Takes a run's checkpoints: by step, by time, and when asked; at most one is being written.

    A checkpoint is taken in three parts. What the next forward pass changes (running statistics, random state) is
    copied at once. The rest, weights and moments, is copied by a thread while the next batch is on its way through
    the model, into buffers kept from one time to the next; `optimizer.step` waits for that. Then a thread writes.

    Args:
        state: the run.
        run: its folder.
    """

    def __init__(self, state: TrainingState, run: Path) -> None:
        self.state, self.config = state, state.config.checkpoint
        self.folder = place(state.config, run)
        self.every = state.steps_of(self.config.every)
        self.for_ever = state.steps_of(self.config.keep_every) if self.config.keep_every else 0
        self.saved_step = state.step
        self.pause_s = 0.0
        self._saved_at = time.monotonic()
        self._writing: tuple[AsyncSaveResponse, CheckpointWriter] | None = None
        # Collectives of the writing thread must not mix with those of the loop.
        wait = timedelta(seconds=state.config.parallel.timeout_s)
        self._group = dist.new_group(backend="gloo", timeout=wait) if world_size() > 1 else None
        on_gpu = state.device.type == "cuda"
        self._stager = DefaultStager(StagingOptions(on_gpu, False, True, on_gpu))
        self._hook = state.optimizer.register_step_pre_hook(lambda *_: self.copied())
        if rank() == 0:
            self._sweep()

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hook.remove()
        # When a rank has failed the others' threads wait for it in vain; a bad step ends all of them.
        if kind is None or world_size() == 1 or issubclass(kind, BadStepError):
            try:
                self.wait()
            except RunError as failure:
                if kind is None:
                    raise
                log.warning("%s", failure)
            self._stager.close()

    def is_due(self) -> bool:
        """Tell whether this rank's clock says that it is time; another's may differ."""
        return 0 < self.config.every_s <= time.monotonic() - self._saved_at

    def save(self) -> None:
        """Begin a checkpoint of the run as it is; every rank must call it.

        Raises:
            RunError: the one before could not be written.
        """
        self.wait()
        started = time.monotonic()
        tensors, values = self.state.state_dict()
        if self.state.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # the copying thread has a stream of its own
        tidy = partial(prune, self.folder, self.state.step, self.config.keep, self.for_ever, self.state.torn)
        self.state.torn = set()  # gone with this one's commit, and what takes their places is sound
        writer = CheckpointWriter(self.folder, self.state.step, rank(), values, tidy)
        response = dcp.async_save(
            nested(tensors, {}),  # by table: DCP takes half a millisecond for every name at the top
            storage_writer=writer,
            process_group=self._group,
            async_stager=self._stager,
            no_dist=self._group is None,
        )
        assert isinstance(response, AsyncSaveResponse)
        self._writing = (response, writer)
        self.saved_step, self._saved_at = self.state.step, time.monotonic()
        self.pause_s += self._saved_at - started
        if not self.config.asynchronous:
            self.wait()

    def copied(self) -> None:
        """Wait until weights and moments may change. Called by `optimizer.step`."""
        if self._writing is not None:
            started = time.monotonic()
            self._writing[0].staging_completion.result()
            self.pause_s += time.monotonic() - started

    def check(self) -> None:
        """Raise what went wrong with a checkpoint that is done, if anything did. Raises RunError."""
        if self._writing is not None and self._writing[0].upload_completion.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the checkpoint that is being written, if any.

        Raises:
            RunError: it could not be written.
        """
        if self._writing is None:
            return
        (response, writer), self._writing = self._writing, None
        started = time.monotonic()
        try:
            response.upload_completion.result()
        except CheckpointException as error:
            if rank() == 0:
                writer.abandon()
            raise cause(error) from None
        finally:
            self.pause_s += time.monotonic() - started

    def _sweep(self) -> None:
        """Remove what a killed run was writing."""
        for name in self.folder.folders():
            if name.startswith(f"{TEMPORARY_PREFIX}{PREFIX}"):
                log.info("%s: removed, a run ended while it was being written", self.folder.path(name))
                (self.folder / name).delete_tree()
