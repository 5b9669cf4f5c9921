"""The learning rate over a run, a function of samples seen; what is decayed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.config import load_toml
from train.config import RunConfig
from train.model import create_model
from train.optim import OptimConfig, create_optimizer, learning_rate

RECIPES = Path(__file__).parents[2] / "train" / "recipes"
SCHEDULES = ("cosine", "constant", "wsd")


def rates(schedule: str, batch: int, total: int = 1000, warmup: int = 100, decay: int = 200) -> dict[int, float]:
    config = OptimConfig.model_validate({"learning_rate": 2.0, "schedule": schedule})
    return {seen: learning_rate(config, seen, warmup, total, decay) for seen in range(0, total + 1, batch)}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warms_up_in_a_line(schedule: str) -> None:
    found = rates(schedule, 10)
    assert [found[seen] for seen in (0, 50, 100)] == [0.0, 1.0, 2.0]


def test_wsd_is_flat_and_then_falls_as_one_less_a_root() -> None:
    found = rates("wsd", 50)
    assert {found[seen] for seen in range(100, 801, 50)} == {2.0}
    assert found[850] == pytest.approx(2 * (1 - math.sqrt(0.25)))
    assert found[1000] == 0.0


def test_cosine_is_half_way_down_in_the_middle() -> None:
    found = rates("cosine", 50)
    assert found[550] == pytest.approx(1.0)
    assert found[1000] == pytest.approx(0.0)


@given(st.sampled_from(SCHEDULES), st.sampled_from([1, 2, 5, 20, 50]))
def test_the_batch_does_not_bend_it(schedule: str, batch: int) -> None:
    """What another batch size passes through, this one does too."""
    fine, coarse = rates(schedule, 1), rates(schedule, batch)
    assert all(fine[seen] == rate for seen, rate in coarse.items())
    after = [rate for seen, rate in fine.items() if seen >= 100]
    assert after == sorted(after, reverse=True)


@pytest.mark.parametrize("name", ["ViT-nano", "RN-nano", "RN10-tiny", "SigLIP-nano"])
@pytest.mark.parametrize("embeddings", [False, True])
def test_gains_and_biases_are_never_decayed(name: str, embeddings: bool) -> None:
    """Every parameter is in one group; tables of embeddings are decayed if asked for."""
    model = create_model(name, 30)
    groups = create_optimizer(model, OptimConfig(decay_embeddings=embeddings)).param_groups
    rate = {parameter: group["weight_decay"] for group in groups for parameter in group["params"]}
    named = dict(model.named_parameters())
    assert sum(len(group["params"]) for group in groups) == len(rate) == len(named)
    decayed = {name for name, parameter in named.items() if rate[parameter]}
    tables = {name for name in named if name.endswith(("token_embedding.weight", "positional_embedding"))}
    assert len(tables) >= 2
    assert decayed & tables == (tables if embeddings else set())
    assert {name for name in named if named[name].ndim >= 2} - tables == decayed - tables


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_decay_as_their_papers_do(recipe: Path) -> None:
    """CLIP's and DataComp's take all weights that are not gains or biases; SigLIP's matrices alone."""
    config = load_toml(recipe, RunConfig)
    assert config.optim.decay_embeddings == recipe.stem.startswith(("clip-", "datacomp-"))
