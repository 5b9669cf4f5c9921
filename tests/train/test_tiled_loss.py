"""Losses computed tile by tile are those of the whole matrix, with all gradients, in a fraction of its memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from train.model import Features
from train.objectives import create_objective
from train.objectives.logsumexp import tiled_logsumexp
from train.objectives.tiles import WHOLE_BYTES, tile_side, tiles

ROOT = Path(__file__).parents[2]
PEAK = """
import re, sys
from pathlib import Path
import torch
from torch.nn import functional as F
from train.model import Features
from train.objectives import create_objective

def resident(what):
    return int(re.search(what + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

name, tile, rows = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
objective = create_objective(name, tile=tile if tile == "auto" else int(tile))

def backward(rows):
    image, text = (F.normalize(torch.randn(rows, 8), dim=1).requires_grad_() for _ in range(2))
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-5.0, requires_grad=True)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    objective(Features(image, text, scale, bias), torch.arange(rows)[:, None])[0].backward()
    return resident("VmHWM") - before

backward(8)
print(backward(rows))
"""


def inputs(rows: int, seed: int, scale: float = 20.0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Unit features of images and texts `[rows, 6]`, scale and bias, all to be differentiated."""
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(rows, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    text = F.normalize(image + text, dim=1)
    values = F.normalize(image, dim=1), text, torch.tensor(scale), torch.tensor(-3.0)
    return [value.to(dtype).requires_grad_() for value in values]


def with_gradients(name: str, given: list[Tensor], tokens: Tensor, **options: Any) -> list[Tensor]:
    """The loss and its gradients of features and scale, and of the bias where there is one."""
    loss, _ = create_objective(name, **options)(Features(*given), tokens)
    return [loss, *torch.autograd.grad(loss, given if name == "siglip" else given[:3])]


def written_out(name: str, given: list[Tensor], tokens: Tensor, **options: Any) -> list[Tensor]:
    """The same by the papers' formulas over the whole matrix."""
    image, text, scale, bias = given
    same = torch.eye(len(image), dtype=torch.float64)
    if options["same_text"] == "positive":
        same = (tokens[:, None] == tokens[None]).all(dim=2).double()
    logits = scale * image @ text.T
    if name == "siglip":
        loss = -F.logsigmoid((2 * same - 1) * (logits + bias)).sum() / len(image)
        return [loss, *torch.autograd.grad(loss, given)]
    target = (1 - options["label_smoothing"]) * same / same.sum(1, keepdim=True) + options["label_smoothing"] / len(
        same
    )
    by_image = -(target * (logits - logits.logsumexp(1, keepdim=True))).sum(1).mean()
    by_text = -(target * (logits.T - logits.T.logsumexp(1, keepdim=True))).sum(1).mean()
    loss = options["image_weight"] * by_image + (1 - options["image_weight"]) * by_text
    return [loss, *torch.autograd.grad(loss, given[:3])]


def assert_equal(found: list[Tensor], expected: list[Tensor], atol: float = 1e-10) -> None:
    """Values and gradients, one by one."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=atol)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    tile=st.integers(0, 50),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([0.1, 14.3, 100.0, 2000.0]),
    texts=st.integers(1, 40),
    same_text=st.sampled_from(["negative", "positive"]),
    label_smoothing=st.sampled_from([0.0, 0.1, 0.9]),
    image_weight=st.sampled_from([0.0, 0.5, 0.75, 1.0]),
)
def test_any_tile_gives_the_clip_formula(
    rows: int, tile: int, seed: int, scale: float, texts: int, **options: Any
) -> None:
    """Loss and gradients, with equal texts, smoothing and weights; a scale of 2,000 spans more than exp does."""
    given_, tokens = inputs(rows, seed, scale), torch.arange(rows)[:, None] % texts
    assert_equal(
        with_gradients("clip", given_, tokens, tile=tile, **options), written_out("clip", given_, tokens, **options)
    )


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    tile=st.integers(0, 50),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([0.1, 14.3, 100.0, 2000.0]),
    texts=st.integers(1, 40),
    same_text=st.sampled_from(["negative", "positive"]),
)
def test_any_tile_gives_the_siglip_formula(
    rows: int, tile: int, seed: int, scale: float, texts: int, same_text: str
) -> None:
    """Loss and gradients, those of the bias too."""
    given_, tokens = inputs(rows, seed, scale), torch.arange(rows)[:, None] % texts
    found = with_gradients("siglip", given_, tokens, tile=tile, same_text=same_text)
    assert_equal(found, written_out("siglip", given_, tokens, same_text=same_text), atol=1e-9 if scale > 100 else 1e-10)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 12), world=st.integers(1, 4), side=st.integers(1, 15), data=st.data())
def test_tiles_cover_the_matrix_once(rows: int, world: int, side: int, data: st.DataObject) -> None:
    """Every cell is in one tile, own pairs on the diagonal of the first of their strip."""
    rank = data.draw(st.integers(0, world - 1))
    seen = torch.zeros(rows, world * rows)
    strips: set[int] = set()
    for tile in tiles(rows, world * rows, rank * rows, side):
        seen[tile.rows, tile.columns] += 1
        assert max(tile.rows.stop - tile.rows.start, tile.columns.stop - tile.columns.start) <= side
        own = rank * rows + tile.rows.start
        assert tile.own == (tile.columns.start == own) == (tile.rows.start not in strips)
        assert tile.before == (tile.columns.start < own)
        strips.add(tile.rows.start)
    assert (seen == 1).all()


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["clip", "siglip"]),
    rows=st.integers(1, 20),
    tile=st.integers(1, 25),
    seed=st.integers(0, 1000),
)
def test_the_first_of_equal_logits_is_ranked_higher(name: str, rows: int, tile: int, seed: int) -> None:
    """Features of few whole numbers, whose logits are often equal: the accuracy is that of `argmax`."""
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randint(0, 2, (rows, 3), generator=generator).double() for _ in range(2))
    one = torch.tensor(1.0, dtype=torch.float64)
    _, numbers = create_objective(name, tile=tile)(Features(image, text, one, one), torch.arange(rows)[:, None])
    assert numbers["accuracy"] == ((image @ text.T).argmax(1) == torch.arange(rows)).float().mean()


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    """Of features, scale and bias, in tiles that do not divide the batch."""
    objective, tokens = create_objective(name, tile=3, same_text="positive"), torch.tensor([[0], [1], [2], [1], [3]])
    assert torch.autograd.gradcheck(
        lambda *given: objective(Features(*given), tokens)[0] + 0 * given[3], inputs(5, 1, scale=5.0)
    )


def test_a_weight_of_each_row_and_column_reaches_its_gradient() -> None:
    """What comes back to single log-sum-exps need not be one number for all."""
    query, keys = (feature.detach().requires_grad_() for feature in inputs(9, 2)[:2])
    weights = torch.randn(2, 9, dtype=torch.float64)
    rows, columns, _ = tiled_logsumexp(query, keys, 0, 4)
    found = torch.autograd.grad((torch.stack([rows, columns]) * weights).sum(), [query, keys])
    logits = query @ keys.T
    expected = (torch.stack([logits.logsumexp(1), logits.logsumexp(0)]) * weights).sum()
    assert_equal(list(found), list(torch.autograd.grad(expected, [query, keys])))


@pytest.mark.parametrize("name", ["clip", "siglip"])
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_tower_gets_no_gradient(name: str, frozen: int) -> None:
    """The other tower's is as before; with neither, the loss is still computed."""
    given_, tokens = inputs(10, 3), torch.arange(10)[:, None]
    expected = with_gradients(name, given_, tokens, tile=4)
    given_[frozen] = given_[frozen].detach()
    loss, _ = create_objective(name, tile=4)(Features(*given_), tokens)
    torch.testing.assert_close(torch.autograd.grad(loss, given_[1 - frozen])[0], expected[2 - frozen])
    with torch.no_grad():
        alone, _ = create_objective(name, tile=4)(Features(*given_), tokens)
    torch.testing.assert_close(alone, loss.detach())


@pytest.mark.parametrize("name", ["clip", "siglip"])
@pytest.mark.parametrize("scale", [0.01, 14.3, 100.0])
def test_float32_is_stable_at_every_temperature(name: str, scale: float) -> None:
    """Tiles in float32 are as near the float64 formula as float32 can be at that scale, opposite pairs included."""
    precise = inputs(64, 4, scale)
    with torch.no_grad():
        precise[1][::3] *= -1
    options = {"same_text": "negative"} | ({"label_smoothing": 0.0, "image_weight": 0.5} if name == "clip" else {})
    expected = written_out(name, precise, torch.arange(64)[:, None], **options)
    single = [value.detach().float().requires_grad_() for value in precise]
    found = with_gradients(name, single, torch.arange(64)[:, None], tile=17)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=2e-6 * max(scale, 1))


def test_a_well_learned_batch_keeps_its_gradient_in_float32() -> None:
    """Where nearly all of each row's softmax is its own pair, what is left of it is as precise as over the matrix."""
    torch.manual_seed(0)
    image = F.normalize(torch.randn(256, 512, dtype=torch.float64), dim=1)
    text = F.normalize(0.35 * image + torch.randn(256, 512, dtype=torch.float64) / 512**0.5, dim=1)

    def gradient(dtype: torch.dtype, tile: int) -> Tensor:
        given_ = [value.detach().to(dtype, copy=True).requires_grad_() for value in (image, text)]
        scale = torch.tensor(100.0, dtype=dtype)
        loss, _ = create_objective("clip", tile=tile)(Features(*given_, scale), torch.arange(256)[:, None])
        found = torch.autograd.grad(loss, given_)[0].double()
        return found - (found * image).sum(1, keepdim=True) * image  # what a unit feature can follow

    precise = gradient(torch.float64, 0)
    whole, tiled = ((gradient(torch.float32, tile) - precise).norm() for tile in (0, 64))
    assert tiled < 3 * whole < 0.01 * precise.norm()


@pytest.mark.parametrize("name", ["clip", "siglip"])
@pytest.mark.parametrize("tile", [0, 5])
def test_half_precision_features_have_float32_logits(name: str, tile: int) -> None:
    """Under autocast too; the gradients take the features' type."""
    half = [value.detach().bfloat16().requires_grad_() for value in inputs(12, 5)[:2]]
    rest = inputs(12, 5, dtype=torch.float32)[2:]
    tokens = torch.arange(12)[:, None]
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = create_objective(name, tile=tile)(Features(*half, *rest), tokens)
    found = [loss, *torch.autograd.grad(loss, [*half, rest[0]])]
    expected = with_gradients(name, [value.detach().float().requires_grad_() for value in half] + rest, tokens, tile=0)
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)
    for one, other in zip(found[1:3], expected[1:3], strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one, other.bfloat16())
    torch.testing.assert_close(found[3], expected[3], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["clip", "siglip"])
@pytest.mark.parametrize("tile", [0, 4])
@pytest.mark.parametrize(("tower", "value"), [(0, torch.nan), (1, torch.nan), (0, torch.inf)])
def test_a_feature_that_is_no_number_is_not_hidden(name: str, tile: int, tower: int, value: float) -> None:
    """One bad number in either tower, in any tile: the loss is not finite."""
    given_ = inputs(10, 6)
    with torch.no_grad():
        given_[tower][7, 2] = value
    assert not with_gradients(name, given_, torch.arange(10)[:, None], tile=tile)[0].isfinite()


def test_auto_takes_the_whole_matrix_while_it_is_small() -> None:
    """Up to the bound in bytes, whatever the type."""
    side = int((WHOLE_BYTES / 4) ** 0.5)
    assert tile_side("auto", side, side, torch.empty(0)) == 0
    assert tile_side("auto", side, side + 1, torch.empty(0)) > 0
    assert tile_side("auto", side, side, torch.empty(0, dtype=torch.float64)) > 0
    assert tile_side(7, side, side, torch.empty(0)) == 7


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell a peak")
@pytest.mark.parametrize(("name", "tile"), [("clip", "auto"), ("siglip", "auto"), ("clip", "0"), ("siglip", "0")])
def test_memory_is_that_of_tiles(name: str, tile: str) -> None:
    """A process' peak over what it held before, next to a matrix of 144 MiB: the whole one breaks the bound."""
    rows = 6144
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PEAK, name, tile, str(rows)]
    ran = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, timeout=240)
    assert (int(ran.stdout) < 4 * rows * rows / 3) == (tile == "auto")
