"""Batches on the device: all of them, in order, whole."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from shards.device import on_device

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no accelerator")),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [0, 1, 5])
def test_every_batch_arrives_in_order(device: str, count: int) -> None:
    pin = device == "cuda"
    batches: list[dict[str, Any]] = []
    for number in range(count):
        image = torch.full((8, 3, 32, 32), number, dtype=torch.uint8)
        batches.append({"image": image.pin_memory() if pin else image, "txt": [str(number)], "pair": (image, number)})
    found = []
    for batch in on_device(batches, device):
        assert batch["image"].device.type == device
        assert batch["pair"][0].device.type == device
        found.append((int(batch["image"].float().mean()), batch["txt"], batch["pair"][1]))
    assert found == [(number, [str(number)], number) for number in range(count)]


def test_one_batch_is_read_ahead_of_an_accelerator_and_none_here() -> None:
    read: list[int] = []

    def batches() -> Any:
        for number in range(3):
            read.append(number)
            yield torch.tensor([number])

    coming = on_device(batches(), "cpu")
    next(coming)
    assert read == [0]


class Pair(NamedTuple):
    """A batch of a type of its own."""

    image: torch.Tensor
    txt: list[str]


@pytest.mark.parametrize("device", DEVICES)
def test_a_named_tuple_stays_one(device: str) -> None:
    (found,) = on_device([Pair(torch.ones(2), ["a", "b"])], device)
    assert isinstance(found, Pair)
    assert (found.image.device.type, found.txt) == (device, ["a", "b"])
