"""Over real processes the mean of the ranks' losses and gradients is that of the whole batch in one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from train.model import Features, create_model
from train.objectives import create_objective
from train.objectives.captioning import CaptioningObjective
from train.objectives.gather import every_rank
from train.parallel import mean_over_ranks, rank, world_size

ROOT = Path(__file__).parents[2]
BATCH, WIDTH, PATIENCE_S = 24, 6, 280
CASES: dict[str, dict[str, Any]] = {
    f"{name}, {same_text}, tile {tile}": {"name": name, "same_text": same_text, "tile": tile, **options}
    for name, options in {"clip": {"label_smoothing": 0.1, "image_weight": 0.75}, "siglip": {}}.items()
    for same_text in ("negative", "positive")
    for tile in (0, 4, 5, 100)
}
FAR_APART = "clip, negative, tile 5, logits far apart"
CASES[FAR_APART] = {"name": "clip", "tile": 5}


def measured(case: str) -> list[Tensor]:
    """Differentiate on this rank's part of a fixed batch.

    Returns:
        The mean over the ranks of the loss, and how many pairs are ranked first; the gradients of the features
        as the parameters of a tower would get them, and those of scale and bias, means over the ranks too.
    """
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(BATCH, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    tokens = torch.randint(0, 9, (BATCH, 2), generator=generator) // 3
    local = BATCH // world_size()
    mine = slice(rank() * local, (rank() + 1) * local)
    # A rank's batch is as wide as its longest text.
    tokens = F.pad(tokens, (0, rank()))
    inputs = [F.normalize(image, dim=1)[mine], F.normalize(image + text, dim=1)[mine]]
    inputs += [torch.tensor(3000.0 if case == FAR_APART else 20.0), torch.tensor(-4.0)]
    inputs = [value.double().requires_grad_() for value in inputs]
    loss, numbers = create_objective(**CASES[case])(Features(*inputs), tokens[mine])
    loss.backward()
    means = mean_over_ranks([loss.item(), numbers["accuracy"].item()])
    right = round(means[1] * BATCH)
    features = [every_rank(value.grad) / world_size() for value in inputs[:2]]
    scalars = mean_over_ranks([0.0 if value.grad is None else value.grad.item() for value in inputs[2:]])
    return [torch.tensor([means[0], right], dtype=torch.float64), *features, torch.tensor(scalars, dtype=torch.float64)]


@pytest.fixture(scope="module", params=[1, 2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Tensor]]:
    """What one, two or four processes come to, case by case."""
    folder, world = tmp_path_factory.mktemp("ranks"), request.param
    command = [sys.executable, __file__, str(folder), str(world)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen([*command, str(number)], env=environment) for number in range(world)]
    try:
        assert [process.wait(timeout=PATIENCE_S) for process in processes] == [0] * world
    finally:
        for process in processes:
            process.kill()
            process.wait()
    found: dict[str, list[Tensor]] = torch.load(folder / "found", weights_only=True)
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_ranks_mean_is_the_whole_batchs(ranks: dict[str, list[Tensor]], case: str) -> None:
    """Loss, accuracy, gradients of features, scale and bias to 1e-10."""
    for found, expected in zip(ranks[case], measured(case), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        assert expected.abs().max() > 0


def test_a_number_that_is_none_reaches_every_rank(ranks: dict[str, list[Tensor]]) -> None:
    """One rank's bad text makes the loss of all of them no number."""
    assert ranks["not a number"][0].isnan().all()


def test_captions_of_unequal_length_count_as_in_one_process(ranks: dict[str, list[Tensor]]) -> None:
    """The ranks' shares of the captions' loss and of its gradient have the mean of all tokens as their mean."""
    for found, expected in zip(ranks["captions"], captioned(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        assert expected.abs().max() > 0


def captioned() -> list[Tensor]:
    """Predict captions of this rank's part of a fixed batch, whose first texts are the shortest.

    Returns:
        The mean over ranks of the loss, the gradient of the image states of all, and the number of tokens of all.
    """
    torch.manual_seed(0)
    model = create_model("ViT-nano", 30)
    objective = CaptioningObjective(decoder_width=16, decoder_heads=2)
    objective.build(model)
    objective.double()
    states = torch.randn(BATCH, 5, model.visual.state_width, dtype=torch.float64)
    tokens = torch.randint(1, 29, (BATCH, model.context_length))
    for number, text in enumerate(tokens):
        end = 2 + number // 2
        text[end], text[end + 1 :] = 29, 0
    local = BATCH // world_size()
    mine = slice(rank() * local, (rank() + 1) * local)
    own = states[mine].requires_grad_()
    denominator = objective.denominator(tokens[mine])
    none = torch.zeros(())
    loss, numbers = objective.of_samples(Features(none, none, none, image_states=own), tokens[mine], denominator)
    loss.backward()
    assert own.grad is not None
    means = mean_over_ranks([loss.item(), numbers["caption_loss"].item()])
    count = denominator * world_size()
    return [torch.tensor(means, dtype=torch.float64), every_rank(own.grad) / world_size(), count]


def not_a_number() -> list[Tensor]:
    """Every rank's tiled losses where the last rank has one bad text."""
    losses = []
    for name in ("clip", "siglip"):
        image, text = torch.randn(2, 6, WIDTH, dtype=torch.float64).unbind()
        if rank() == world_size() - 1:
            text[3, 1] = torch.nan
        one = torch.tensor(1.0, dtype=torch.float64)
        losses.append(create_objective(name, tile=4)(Features(image, text, one, one), torch.arange(6)[:, None])[0])
    return [every_rank(torch.stack(losses))]


if __name__ == "__main__":
    folder, world, number = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=world)
    found = {case: measured(case) for case in CASES} | {"not a number": not_a_number(), "captions": captioned()}
    if number == 0:
        torch.save(found, folder / "found")
    dist.barrier()
    dist.destroy_process_group()
