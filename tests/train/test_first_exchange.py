"""The first exchange of gradients after a start gives the bits that any later one gives, so that a resumed run does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from infra.config import parse
from infra.storage import Folder
from tests.train.forked import become_ranks, run_ranks
from train.accumulate import forward_backward
from train.config import RunConfig
from train.gradients import zero_gradients
from train.launch import prepare
from train.state import build

PATIENCE_S = 120
TOWERS = {"vision": {}, "vit": {"image_size": 16, "patch_size": 8, "width": 64, "layers": 2, "heads": 2}}


@pytest.mark.parametrize("micro_batch", [0, 2])
def test_three_ranks_sum_alike_from_the_first_step_on(
    tmp_path: Path, make_config: Callable[..., RunConfig], micro_batch: int
) -> None:
    """Of two, the order of a sum is of no matter."""
    config = make_config(model=TOWERS, data={"global_batch_size": 12}, parallel={"micro_batch": micro_batch})
    prepare(config, tmp_path, 3)
    run_ranks(__file__, 3, str(tmp_path), PATIENCE_S)


def compare(run: str) -> None:
    """Take one batch's gradients three times."""
    torch.set_num_threads(1)
    state = build(parse(Folder(run).read_json("config.json"), RunConfig, source=run), run)
    batches = iter(state.data)
    batch = next(batches)
    images, found = batch.images.float() / 255, []
    for _ in range(3):
        forward_backward(state, images, batch.tokens)
        found.append([(name, value.grad.clone()) for name, value in state.model.named_parameters()])
        zero_gradients(state.parameters())
    batches.close()  # type: ignore[attr-defined]
    for later in found[1:]:
        odd = [name for (name, one), (_, other) in zip(found[0], later, strict=True) if not torch.equal(one, other)]
        assert not odd, odd


if __name__ == "__main__":
    become_ranks(compare)
