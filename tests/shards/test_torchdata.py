"""torchdata's StatefulDataLoader over the stream: stopped in mid-epoch, resumed exactly."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import pytest
from torchdata.stateful_dataloader import StatefulDataLoader

from infra.storage import Folder
from shards.stream import ShardStream

BATCH, EPOCHS = 24, 2
Parts = list[list[tuple[int, int, int, str]]]


@pytest.fixture(scope="module")
def corpus(shards_of: Callable[..., Folder]) -> Folder:
    return shards_of(70, 65)


def loader_of(corpus: Folder, workers: int, **options: Any) -> Any:
    stream = ShardStream(corpus, global_batch_size=BATCH, rank=1, world_size=2, epochs=EPOCHS, seed=4)
    return StatefulDataLoader(stream, batch_size=None, num_workers=workers, **options)


def places(parts: Iterator[Any]) -> Parts:
    return [[(one["__epoch__"], one["__step__"], one["__slot__"], one["__key__"]) for one in part] for part in parts]


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_a_state_taken_anywhere_gives_the_exact_continuation(corpus: Folder, workers: int) -> None:
    stream = ShardStream(corpus, global_batch_size=BATCH, rank=1, world_size=2, epochs=EPOCHS, seed=4)
    batches = places(iter(stream))
    each = max(1, workers)
    whole = places(iter(loader_of(corpus, workers)))
    # The parts of a batch come one after the other, in slot order.
    assert [list(chain(*whole[at : at + each])) for at in range(0, len(whole), each)] == batches
    for taken in (1, 4, len(whole) // 2 + 1, len(whole) - 1):
        loader = loader_of(corpus, workers)
        parts = iter(loader)
        seen = places(next(parts) for _ in range(taken))
        state = json.loads(json.dumps(loader.state_dict()))
        del parts
        again = loader_of(corpus, workers)
        again.load_state_dict(state)
        assert seen + places(iter(again)) == whole
        if workers == 3:
            break  # starting processes is what takes time here


@pytest.mark.parametrize("workers", [0, 2])
def test_passes_go_on_without_set_epoch(corpus: Folder, workers: int) -> None:
    loader = loader_of(corpus, workers, persistent_workers=workers > 0)
    first, second = places(iter(loader)), places(iter(loader))
    assert len(first) == len(second)
    assert {epoch for part in first for epoch, *_ in part} == {0, 1}
    assert {epoch for part in second for epoch, *_ in part} == {2, 3}


@pytest.mark.parametrize("workers", [0, 1])
def test_its_length_is_the_streams(corpus: Folder, workers: int) -> None:
    loader = loader_of(corpus, workers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(loader) == len(loader.dataset) == 2 * (135 // BATCH) == sum(1 for _ in loader)
