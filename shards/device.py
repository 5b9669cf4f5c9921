"""Batches on their way to the device that computes: the next one is copied while this one is used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch


def on_device(batches: Iterable[Any], device: torch.device | str) -> Iterator[Any]:
    """Yield the batches with their tensors on `device`, lists and texts as they are.

    On an accelerator each batch is copied on a stream of its own, beside the work on the one before it; from pinned
    memory (`Loader(pin_memory=True)`) the copy takes no turn of the processor. One batch more than is used is held
    there. A batch is a tensor, or a mapping, list or tuple of what a batch is.
    """
    device = torch.device(device)
    if device.type != "cuda":
        yield from (_moved(batch, device) for batch in batches)
        return
    copying = torch.cuda.Stream(device)
    coming: list[tuple[Any, torch.cuda.Event]] = []
    for batch in batches:
        with torch.cuda.stream(copying):
            coming.append((_moved(batch, device), copying.record_event()))
        if len(coming) > 1:
            yield _taken(*coming.pop(0), device)
    for one in coming:
        yield _taken(*one, device)


def _taken(batch: Any, copied: torch.cuda.Event, device: torch.device) -> Any:
    computing = torch.cuda.current_stream(device)
    computing.wait_event(copied)
    for tensor in _tensors(batch):
        tensor.record_stream(computing)  # its memory is not the copying stream's to use again before this one is done
    return batch


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {name: _moved(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        values = [_moved(value, device) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def _tensors(batch: Any) -> Iterator[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, tuple | list):
        for value in batch:
            yield from _tensors(value)
