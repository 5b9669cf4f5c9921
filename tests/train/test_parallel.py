"""What a model that is spread over real gloo processes holds and does, and options that cannot be."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from infra.config import parse
from infra.errors import UserError
from tests.train.forked import become_ranks, run_ranks
from train.config import RunConfig
from train.model import DualEncoder, ModelConfig, TextConfig, VisionConfig, create_model
from train.objectives import create_objective
from train.parallel import ParallelConfig, parallelize, rank, world_size
from train.precision import autocast

PATIENCE_S, COMPILING_S = 280, 850
CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


def small_model() -> DualEncoder:
    """The same on every rank."""
    torch.manual_seed(5)
    vision = VisionConfig(widths=(8,), depths=(1,), statistics_group=4)
    text = TextConfig(context=6, width=32, layers=1, heads=2)
    return create_model(ModelConfig(embed_dim=16, vision=vision, text=text), 64)


def batch(samples: int = 8) -> tuple[Tensor, Tensor]:
    """This rank's part of a fixed batch of `samples` for each rank."""
    draws = torch.Generator().manual_seed(11)
    images = torch.randn(samples * world_size(), 3, 16, 16, generator=draws)
    tokens = torch.randint(1, 63, (samples * world_size(), 6), generator=draws)
    mine = slice(rank() * samples, (rank() + 1) * samples)
    return images[mine], tokens[mine]


def gradients(config: ParallelConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Every parameter's gradient after one backward pass, whole, and the buffers."""
    from train.gradients import average_gradients

    model = small_model()
    module = parallelize(model, config, CPU, dtype)
    images, tokens = batch()
    objective = create_objective("clip")
    with autocast(dtype, CPU):
        features = module(images, tokens)
    loss, _ = objective(features, tokens)
    loss.backward()
    average_gradients(module, objective)
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert found.keys() == dict(small_model().named_parameters()).keys()
    found = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in found.items()}
    return found | {name: value for name, value in model.named_buffers() if value.is_floating_point()}


def fsdp(**options: Any) -> ParallelConfig:
    """Sharded, in float32."""
    return ParallelConfig(strategy="fsdp", precision="float32", **options)


def check_shards() -> None:
    """A rank holds its share of the parameters; scalars and batch normalisation are whole."""
    for shard in (0, 2):
        model = small_model()
        full = sum(parameter.numel() for parameter in model.parameters())
        parallelize(model, fsdp(shard=shard), CPU)
        local = {
            name: parameter.to_local() if isinstance(parameter, DTensor) else parameter
            for name, parameter in model.named_parameters()
        }
        share = sum(value.numel() for value in local.values()) / full
        assert 1 <= share * (shard or world_size()) < 1.1, share
        whole = {name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)}
        assert "logit_scale" in whole
        assert all(".bn" in name for name in whole - {"logit_scale"}), whole


def check_offload() -> None:
    """Offloaded shards give the same gradients."""
    expected = gradients(ParallelConfig(precision="float32"))
    for name, value in gradients(fsdp(cpu_offload=True)).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def check_bfloat16() -> None:
    """Weights gathered in bfloat16 give gradients near those of float32; the temperature's stays in float32."""
    expected = gradients(ParallelConfig(precision="float32"))
    found = gradients(fsdp(), torch.bfloat16)
    assert {value.dtype for value in found.values()} == {torch.float32}
    for name in ("text_projection", "transformer.resblocks.0.mlp.c_fc.weight"):
        assert torch.cosine_similarity(found[name].flatten(), expected[name].flatten(), dim=0) > 0.95, name


def check_compiled() -> None:
    """Compiled blocks give the same gradients and running statistics, recomputed, replicated or sharded."""
    expected = gradients(ParallelConfig(precision="float32"))
    for strategy in ("ddp", "fsdp"):
        config = ParallelConfig(strategy=strategy, compile=True, checkpoint_activations=True, precision="float32")
        for name, value in gradients(config).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-3)
    assert counters["stats"]["unique_graphs"] >= 2, "nothing was compiled"


def check_groups_must_divide() -> None:
    """Groups of 3 in a world of 4."""
    with pytest.raises(UserError, match=r"parallel.shard: groups of 3 ranks do not divide a world of 4"):
        parallelize(small_model(), fsdp(shard=3), CPU)


@pytest.mark.parametrize(
    ("check", "world"),
    [
        (check_shards, 4),
        (check_offload, 2),
        (check_bfloat16, 2),
        (check_groups_must_divide, 4),
        pytest.param(check_compiled, 2, marks=[pytest.mark.slow, pytest.mark.timeout(900), needs_compiler]),
    ],
)
def test_over_processes(check: Callable[[], None], world: int, tmp_path: Path) -> None:
    """The check holds on every rank."""
    compiler = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    patience_s = COMPILING_S if check is check_compiled else PATIENCE_S
    run_ranks(__file__, world, check.__name__, patience_s, compiler)


@pytest.mark.parametrize("option", ["shard = 2", "cpu_offload = true"])
def test_options_of_sharding_need_fsdp(option: str) -> None:
    """With DDP they would do nothing."""
    name, _, value = option.partition(" = ")
    with pytest.raises(UserError, match=rf"{name} says how a model is sharded: set strategy = 'fsdp'"):
        parse({"parallel": {name: {"true": True}.get(value, 2)}}, RunConfig, source="run.toml")


def test_one_process_has_nothing_to_offload() -> None:
    """Rather than a run that does not fit."""
    with pytest.raises(UserError, match=r"parallel.cpu_offload: one process"):
        parallelize(small_model(), fsdp(cpu_offload=True), CPU)


if __name__ == "__main__":
    become_ranks(lambda check: globals()[check]())
