"""The loss and its gradient, alone and over real processes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from infra.errors import UserError
from train.model import Features, ModelConfig, TextConfig, VisionConfig, create_model
from train.objectives import create_objective

ROOT = Path(__file__).parents[2]
BATCH, STEPS, SIDE = 16, 4, 16


def test_gradient_is_that_of_the_full_matrix() -> None:
    """Loss and gradients equal the textbook formula written out over the whole matrix."""
    torch.manual_seed(0)
    raw = [torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    features = Features(F.normalize(raw[0], dim=1), F.normalize(raw[1], dim=1), scale.exp())
    loss, numbers = create_objective("clip")(features, torch.arange(6)[:, None])
    gradients = torch.autograd.grad(loss, [*raw, scale])

    logits = scale.exp() * F.normalize(raw[0], dim=1) @ F.normalize(raw[1], dim=1).T
    rows = (logits.diagonal() - logits.logsumexp(1)).mean()
    columns = (logits.diagonal() - logits.logsumexp(0)).mean()
    expected = -(rows + columns) / 2
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    for found, wanted in zip(gradients, torch.autograd.grad(expected, [*raw, scale]), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert numbers["accuracy"] == (logits.argmax(1) == torch.arange(6)).double().mean()


def test_same_text_can_share_the_target() -> None:
    """Two pictures of one caption: as positives they are no error, as negatives they cost log 2."""
    unit = torch.eye(2, dtype=torch.float64)
    both = unit[[0, 0, 1]]
    tokens = torch.tensor([[5, 9], [5, 9], [6, 9]])
    features = Features(both, both, torch.tensor(100.0, dtype=torch.float64))
    shared, _ = create_objective("clip", same_text="positive")(features, tokens)
    against, _ = create_objective("clip")(features, tokens)
    torch.testing.assert_close(against.item(), 2 / 3 * math.log(2))
    torch.testing.assert_close(shared.item(), 2 / 3 * math.log(2))  # the entropy of the target: the least possible
    torch.testing.assert_close(_gradient("positive", both, tokens), torch.zeros(3, 2, dtype=torch.float64))


def _gradient(same_text: str, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    image = rows.clone().requires_grad_()
    features = Features(image, rows, torch.tensor(100.0, dtype=torch.float64))
    loss, _ = create_objective("clip", same_text=same_text)(features, tokens)
    return torch.autograd.grad(loss, image)[0]


@pytest.mark.parametrize("tile", [0, 1])
def test_directions_can_be_weighed(tile: int) -> None:
    """ConVIRT's lambda: two images alike, so finding a text's image costs log 2 and more, an image's text less."""
    image = torch.eye(2, dtype=torch.float64)[[0, 0]]
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    features = Features(image, text, torch.tensor(8.0, dtype=torch.float64))
    by_image = (math.log1p(math.exp(-8)) + math.log1p(math.exp(8))) / 2
    for weight in (0.0, 0.75, 1.0):
        objective = create_objective("clip", image_weight=weight, tile=tile)
        loss, _ = objective(features, torch.arange(2)[:, None])
        assert loss.item() == pytest.approx(weight * by_image + (1 - weight) * math.log(2), rel=1e-12)


def test_logit_scale_is_clamped() -> None:
    """After a step the scale is 100 at most."""
    model = create_model("RN10-tiny", 100)
    with torch.no_grad():
        model.logit_scale.fill_(7.0)
    create_objective("clip").constrain(model)
    assert model.logit_scale.exp().item() == pytest.approx(100)


def test_unknown_objective_names_the_nearest() -> None:
    """A wrong name is the user's mistake."""
    with pytest.raises(UserError, match="did you mean 'clip'"):
        create_objective("clipp")


@pytest.mark.parametrize(("world", "same_text"), [(1, "positive"), (2, "negative"), (2, "positive")])
def test_processes_equal_one_process(tmp_path: Path, world: int, same_text: str) -> None:
    """SGD in float64 over real gloo processes: weights and running statistics as one process has them."""
    ranks(tmp_path / "many", world, same_text)
    found = torch.load(tmp_path / "many", weights_only=True)
    expected = steps(same_text)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


def ranks(path: Path, world: int, same_text: str) -> None:
    """Run this file as `world` processes; the first one leaves its weights at `path`."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(world),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, __file__, str(path), same_text]
    processes = [subprocess.Popen(command, env=environment | {"RANK": str(rank)}) for rank in range(world)]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0] * world
    finally:
        for process in processes:
            process.kill()
            process.wait()


def steps(same_text: str) -> dict[str, torch.Tensor]:
    """Take a few SGD steps on this rank's part of a fixed batch; return the model's state."""
    from train.parallel import average_buffers, parallelize, rank, world_size

    torch.set_num_threads(1)
    torch.manual_seed(3)
    vision = VisionConfig(widths=(4, 8), depths=(1, 1), statistics_group=4)
    text = TextConfig(context=6, width=8, layers=1, heads=2)
    model = create_model(ModelConfig(embed_dim=8, vision=vision, text=text), 20).double()
    module = parallelize(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    objective = create_objective("clip", label_smoothing=0.1, same_text=same_text)
    local = BATCH // world_size()
    mine = slice(rank() * local, (rank() + 1) * local)
    for _ in range(STEPS):
        images, tokens = torch.randn(BATCH, 3, SIDE, SIDE).double(), torch.randint(1, 19, (BATCH, 6))
        tokens[1::4] = tokens[0]
        tokens[:, -1] = 19
        loss, _ = objective(module(images[mine], tokens[mine]), tokens[mine])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.constrain(model)
        average_buffers(model)
    return model.state_dict()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    state = steps(sys.argv[2])
    if dist.get_rank() == 0:
        torch.save(state, sys.argv[1])
    dist.barrier()
    dist.destroy_process_group()
