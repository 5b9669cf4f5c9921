"""Loader processes: the stream's own batches, whatever their number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from infra.errors import UserError
from infra.storage import Folder
from shards.loader import Loader, joined
from shards.pictures import RandomCrop, collated
from shards.stream import ShardStream

Places = list[tuple[int, int, int, str]]


def places(samples: list[dict[str, Any]]) -> Places:
    return [(one["__epoch__"], one["__step__"], one["__slot__"], one["__key__"]) for one in samples]


def tensors(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {"image": torch.stack([torch.from_numpy(sample["jpg"]) for sample in samples])}


@pytest.fixture(scope="module")
def corpus(shards_of: Callable[..., Folder]) -> Folder:
    return shards_of(70, 65)


def test_workers_change_nothing(corpus: Folder) -> None:
    def stream() -> ShardStream:
        return ShardStream(corpus, global_batch_size=24, rank=1, world_size=2, epochs=2, remainder="keep")

    alone = [places(batch) for batch in stream()]
    assert len(alone) == len(Loader(stream())) == 12
    assert list(Loader(stream(), transform=places)) == alone
    loader = Loader(stream(), workers=3, transform=places)
    assert list(loader) == alone
    assert loader.state_dict()["epoch"] == 2
    again = list(loader)
    assert len(again) == 12
    assert {epoch for batch in again for epoch, *_ in batch} == {2, 3}


def test_resumed_with_other_workers(corpus: Folder) -> None:
    alone = [places(batch) for batch in ShardStream(corpus, global_batch_size=24, epochs=2)]
    loader = Loader(ShardStream(corpus, global_batch_size=24, epochs=2), workers=2, transform=places)
    batches = iter(loader)
    seen = [next(batches) for _ in range(4)]
    state = loader.state_dict()
    del batches
    other = Loader(ShardStream(corpus, global_batch_size=24, epochs=2), workers=3, transform=places)
    other.load_state_dict(state)
    assert seen + list(other) == alone


def test_tensors_are_joined(corpus: Folder) -> None:
    stream = ShardStream(corpus, global_batch_size=24, decode=True)
    (first, *_) = Loader(stream, workers=2, transform=tensors)
    expected = tensors(next(iter(ShardStream(corpus, global_batch_size=24, decode=True))))
    assert torch.equal(first["image"], expected["image"])
    assert first["image"].shape == (24, 8, 8, 3)
    assert first["image"].dtype == torch.uint8
    parts: list[Any] = [(torch.ones(1), ["a"]), (torch.zeros(2), ["b", "c"])]
    assert joined(parts)[0].tolist() == [1, 0, 0]
    assert joined(parts)[1] == ["a", "b", "c"]


def test_holes_of_workers_are_counted(own_shards: Folder) -> None:
    Path(own_shards.path("00002.tar")).unlink()
    stream = ShardStream(own_shards, global_batch_size=6, skip_unreadable=True, remainder="keep")
    loader = Loader(stream, workers=2, transform=places)
    assert sum(len(batch) for batch in loader) == 54
    assert stream.holes == 12


def test_workers_that_do_not_divide_are_the_users_mistake(corpus: Folder) -> None:
    with pytest.raises(UserError, match="10 readers"):
        Loader(ShardStream(corpus, global_batch_size=24, world_size=2), workers=5)


@pytest.mark.parametrize("samples", [(9,), (6, 5)])
def test_an_epochs_last_batch_may_leave_workers_without_a_part(
    shards_of: Callable[..., Folder], samples: tuple[int, ...]
) -> None:
    def loader(workers: int) -> Loader:
        crop = RandomCrop(4)
        stream = ShardStream(shards_of(*samples), global_batch_size=8, remainder="keep", decode=crop)
        return Loader(stream, workers=workers, transform=collated)

    alone, shared = list(loader(0)), list(loader(4))
    assert [len(batch["key"]) for batch in shared] == [8, sum(samples) - 8]
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one["image"], other["image"])
        assert (one["key"], one["txt"]) == (other["key"], other["txt"])


class Columns(NamedTuple):
    """A batch of a type of its own."""

    number: np.ndarray[Any, Any]
    key: list[str]


def columns(samples: list[dict[str, Any]]) -> Columns:
    return Columns(np.array([sample["__index__"] for sample in samples]), [sample["__key__"] for sample in samples])


def test_arrays_and_named_tuples_are_the_same_with_workers(corpus: Folder) -> None:
    alone, shared = (
        list(Loader(ShardStream(corpus, global_batch_size=24), workers=workers, transform=columns))
        for workers in (0, 2)
    )
    assert all(isinstance(batch, Columns) for batch in shared)
    assert [(batch.number.tolist(), batch.key) for batch in shared] == [
        (batch.number.tolist(), batch.key) for batch in alone
    ]


@pytest.mark.parametrize(
    ("part", "named"),
    [("abc", "a str"), ({"n": 3}, "a int"), (None, "a NoneType"), (torch.ones(()), "a Tensor without an axis")],
)
def test_what_cannot_be_joined_is_named(part: Any, named: str) -> None:
    assert joined([part]) is part
    with pytest.raises(UserError, match=f"have {named}.*give a `merge`"):
        joined([part, part])


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_are_pinned_where_there_is_an_accelerator(corpus: Folder, workers: int) -> None:
    stream = ShardStream(corpus, global_batch_size=24, decode=True)
    first = next(iter(Loader(stream, workers=workers, transform=tensors, pin_memory=True)))
    assert first["image"].is_pinned() == torch.accelerator.is_available()


def test_numbers_of_workers_that_are_none(corpus: Folder) -> None:
    for wrong in ({"workers": -1}, {"workers": 2, "prefetch": 0}):
        with pytest.raises(UserError, match="give 0 or more workers"):
            Loader(ShardStream(corpus, global_batch_size=24), **wrong)
