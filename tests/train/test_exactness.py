"""Training over real gloo processes equals one process on the whole batch, however the model is spread.

One set of ranks a world size goes through all cases, since starting them takes longer than a case.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.train.forked import become_ranks, run_ranks
from train.accumulate import forward_backward
from train.config import RunConfig
from train.gradients import clip_gradients, zero_gradients
from train.model import DualEncoder, Features, ModelConfig, TextConfig, VisionConfig, ViTConfig, create_model
from train.objectives import Objective, create_objective
from train.objectives.captioning import CaptioningObjective
from train.optim import OptimConfig, create_optimizer
from train.parallel import ParallelConfig, average_buffers, parallelize, rank, world_size
from train.state import TrainingState

BATCH, STEPS, SIDE, CONTEXT, VOCABULARY = 16, 5, 16, 6, 20
CLIP_NORM = 0.5
"""Below the norms that occur, so clipping is a part of what has to be equal."""
PATIENCE_S = 200

TEXT = TextConfig(context=CONTEXT, width=8, layers=2, heads=2)
MODELS = {
    "resnet": ModelConfig(
        embed_dim=8, vision=VisionConfig(widths=(4, 8), depths=(1, 1), statistics_group=2), text=TEXT
    ),
}
OTHER_MODELS = {
    "vit": ModelConfig(
        embed_dim=8, vit=ViTConfig(image_size=SIDE, patch_size=8, width=8, layers=2, heads=2), text=TEXT
    ),
    "siglip": ModelConfig(
        embed_dim=8,
        logit_bias=-2.0,
        vit=ViTConfig(image_size=SIDE, patch_size=8, width=8, layers=1, heads=2, pool="attention"),
        text=TextConfig(context=CONTEXT, width=8, layers=1, heads=2, causal=False, pool="last", projection_bias=True),
    ),
}
OTHER_MODELS["without bias"] = OTHER_MODELS["siglip"].model_copy(update={"logit_bias": None})
OBJECTIVES: dict[str, dict[str, Any]] = {
    "clip": {"name": "clip", "label_smoothing": 0.1},
    "tiles": {"name": "clip", "tile": 3},
    "same text": {"name": "clip", "same_text": "positive"},
}
CAPTIONING: dict[str, Any] = {"name": "captioning", "decoder_layers": 2, "decoder_width": 8, "decoder_heads": 2}
SIGMOID: dict[str, dict[str, Any]] = {"siglip": {"name": "siglip", "tile": 3}}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


class Case(NamedTuple):
    """One way to train."""

    model: str = "resnet"
    objective: str = "clip"
    optimizer: str = "sgd"
    dtype: torch.dtype = torch.float64
    parallel: tuple[tuple[str, Any], ...] = ()

    def reference(self) -> Case:
        """The same without anything that may not make a difference."""
        return self._replace(parallel=())

    def __str__(self) -> str:
        return f"{self.model}, {self.objective}, {self.optimizer}, {self.dtype}, {dict(self.parallel)}"


class Headed(nn.Module):
    """An objective with parameters of its own: CLIP's loss behind a linear head."""

    needs: frozenset[str] = frozenset()

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 8)
        self.clip = create_objective("clip")

    def forward(self, features: Features, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Rank pairs by features behind the head."""
        image = nn.functional.normalize(self.head(features.image), dim=1)
        return self.clip(features._replace(image=image), tokens)

    def constrain(self, model: DualEncoder) -> None:
        """As CLIP's."""
        self.clip.constrain(model)


class StateReader:
    """An objective whose call reads states: CLIP's loss on the mean of all tokens and of all cells."""

    needs = frozenset({"text_states", "image_states"})

    def __call__(self, features: Features, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Rank pairs by these means, added to the pooled features."""
        assert features.image_states is not None
        assert features.text_states is not None
        image = nn.functional.normalize(features.image + features.image_states.mean(1), dim=1)
        text = nn.functional.normalize(features.text + features.text_states.mean(1), dim=1)
        return create_objective("clip")(features._replace(image=image, text=text), tokens)

    def constrain(self, model: DualEncoder) -> None:
        """As CLIP's."""
        create_objective("clip").constrain(model)


def cases(world: int) -> Iterator[Case]:
    """Every way that a world of that size is to be tried in."""
    placements: list[dict[str, Any]] = [{}]
    if world > 1:
        placements.append({"strategy": "fsdp"})
    if world == 4:
        placements.append({"strategy": "fsdp", "shard": 2})
    # A rank's whole batch as one micro batch, and a last one that is smaller.
    micro_batches = {1: (0, 2, BATCH), 2: (0, 2, 6, BATCH // 2), 4: (0, 2)}[world]
    for model in MODELS:
        for placement, micro in product(placements, micro_batches):
            yield Case(model, parallel=_options(placement, micro_batch=micro))
        for placement in placements:
            yield Case(model, parallel=_options(placement, micro_batch=2, checkpoint_activations=True))
            yield Case(model, dtype=torch.float32, parallel=_options(placement, micro_batch=2))
    for objective in (*OBJECTIVES, "headed"):
        for placement in placements[-1:] if world == 4 else placements:
            yield Case(objective=objective, optimizer="adamw", parallel=_options(placement, micro_batch=2))
    for placement in placements:
        yield Case("vit", "captioning", parallel=_options(placement, micro_batch=2))
        yield Case("vit", "states", parallel=_options(placement, micro_batch=2))
    yield Case("vit", "captioning", parallel=_options(placements[0]))
    yield Case("without bias", "captioning", parallel=_options(placements[-1], micro_batch=2))
    yield Case("resnet", "captioning", "adamw", parallel=_options(placements[-1], micro_batch=2))
    for placement in placements:
        yield Case("vit", parallel=_options(placement, micro_batch=2, checkpoint_activations=True))
        yield Case("vit", "tiles", dtype=torch.float32, parallel=_options(placement, micro_batch=2))
        yield Case("siglip", "siglip", parallel=_options(placement, micro_batch=2))


def _options(placement: dict[str, Any], **more: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted({**placement, **more}.items()))


def trained(case: Case) -> dict[str, Tensor]:
    """Take a few steps on this rank's part of fixed batches; return all weights, whole, and the norms."""
    state = new_state(case)
    local = BATCH // world_size()
    mine = slice(rank() * local, (rank() + 1) * local)
    draws = torch.Generator().manual_seed(7)
    norms = []
    for _ in range(STEPS):
        images = torch.randn(BATCH, 3, SIDE, SIDE, generator=draws, dtype=torch.float64).to(case.dtype)
        tokens = torch.randint(1, VOCABULARY - 1, (BATCH, CONTEXT), generator=draws)
        tokens[1::4] = tokens[0].clone()
        tokens[:, -1] = VOCABULARY - 1
        # Texts of other lengths, unevenly over ranks and micro batches.
        tokens[3::5, 2], tokens[3::5, 3:] = VOCABULARY - 1, 0
        forward_backward(state, images[mine], tokens[mine])
        norms.append(clip_gradients(state.parameters(), CLIP_NORM))
        state.optimizer.step()
        zero_gradients(state.parameters())
        state.objective.constrain(state.model)
        average_buffers(state.model)
    content = {f"model.{name}": whole(value) for name, value in state.model.state_dict().items()}
    if isinstance(state.objective, nn.Module):
        content |= {f"objective.{name}": value for name, value in state.objective.state_dict().items()}
    return content | {"norms": torch.stack(norms)}


def new_state(case: Case) -> TrainingState:
    """A run without data, at its beginning."""
    torch.manual_seed(3)
    model = create_model((MODELS | OTHER_MODELS)[case.model], VOCABULARY).to(case.dtype)
    objective = new_objective(case, model)
    parallel, device = ParallelConfig(precision="float32", **dict(case.parallel)), torch.device("cpu")
    module = parallelize(model, parallel, device)
    own = objective.parameters() if isinstance(objective, nn.Module) else []
    if case.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD([*model.parameters(), *own], lr=0.1)
    else:
        heads = [objective] if isinstance(objective, nn.Module) else []
        optimizer = create_optimizer(model, OptimConfig(learning_rate=1e-2, epsilon=1e-3), *heads)
    parts: dict[str, Any] = dict.fromkeys(field.name for field in fields(TrainingState) if field.default is MISSING)
    parts |= {"config": RunConfig(parallel=parallel), "model": model, "parallel": module, "objective": objective}
    return TrainingState(**parts | {"optimizer": optimizer, "dtype": torch.float32, "device": device})


def new_objective(case: Case, model: DualEncoder) -> Objective:
    """The case's objective; its own weights, if it has any, are drawn."""
    if case.objective == "headed":
        return Headed().to(case.dtype)
    if case.objective == "states":
        return StateReader()
    objective = create_objective(**(OBJECTIVES | SIGMOID | {"captioning": CAPTIONING})[case.objective])
    if isinstance(objective, CaptioningObjective):
        objective.build(model)
        objective.to(case.dtype)
    return objective


def whole(value: Tensor) -> Tensor:
    """All of a tensor, sharded or not; every rank must call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small only wait for more threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def references() -> dict[Case, dict[str, Tensor]]:
    """What one process has after training on whole batches, by case; filled as it is asked for."""
    return {}


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_equals_one_process_on_the_whole_batch(
    world: int, tmp_path: Path, references: dict[Case, dict[str, Tensor]]
) -> None:
    """Parameters, temperature, running statistics and gradient norms are those of the textbook."""
    if world == 1:
        found = [trained(case) for case in cases(world)]
    else:
        run_ranks(__file__, world, str(tmp_path / "found"), PATIENCE_S)
        found = torch.load(tmp_path / "found", weights_only=True)
    wrong = []
    for number, case in enumerate(cases(world)):
        if case.reference() not in references:
            references[case.reference()] = trained(case.reference())
        expected = references[case.reference()]
        assert found[number].keys() == expected.keys()
        for name, value in expected.items():
            distance = (found[number][name] - value).abs()
            # A norm is hundreds of times larger than a step.
            distance = distance / value / 10 if name == "norms" else distance
            if not distance.max() <= TOLERANCE[case.dtype]:
                wrong.append(f"{case}: {name} is off by {distance.max():.1e}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("case", [Case(), Case("vit", "captioning")], ids=str)
def test_reference_trains_every_parameter(case: Case) -> None:
    """Each parameter moves, the temperature too, and clipping takes part: else equality would say little."""
    state = new_state(case)
    before = {f"model.{name}": value.clone() for name, value in state.model.state_dict().items()}
    if isinstance(state.objective, nn.Module):
        before |= {f"objective.{name}": value.clone() for name, value in state.objective.state_dict().items()}
    after = trained(case)
    still = [name for name, value in before.items() if torch.equal(after[name], value)]
    assert [name for name in still if "num_batches_tracked" not in name] == []
    assert (after["norms"] > CLIP_NORM).all()


def train_cases(path: str) -> None:
    """Go through all cases; the first rank leaves at `path` what came out."""
    states = [trained(case) for case in cases(dist.get_world_size())]
    if dist.get_rank() == 0:
        torch.save(states, path)


if __name__ == "__main__":
    become_ranks(train_cases)
