"""A checkpoint written by two ranks, under DDP or FSDP, is read by one and by four, spread either way."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from train.config import RunConfig
from train.launch import prepare

ROOT = Path(__file__).parents[2]
PATIENCE_S = 250
RANKS = """
import json, multiprocessing, sys
from dataclasses import replace
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from infra.config import parse
from train import checkpoint
from train.config import RunConfig
from train.log import _parameter_norm
from train.loop import resumed
from train.optim import WeightAverage, create_optimizer
from train.state import build

config, run, spread = parse(json.loads(sys.argv[1]), RunConfig, source="test"), Path(sys.argv[2]), sys.argv[3]

def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

def spread_out(how, seed):
    state = build(config, run)
    torch.manual_seed(seed)
    for value in state.model.state_dict().values():
        value.copy_(torch.randn(value.shape))
    model = state.model
    if how == "fsdp":
        alone = {parameter for parameter in model.parameters() if not parameter.ndim}
        model = fully_shard(model, ignored_params=alone)
    average = WeightAverage(model, 0.5)
    return replace(state, model=model, optimizer=create_optimizer(model, config.optim), average=average)

def take_a_step(state):
    for parameter in state.model.parameters():
        full = torch.randn(parameter.shape)
        if isinstance(parameter, DTensor):
            full = distribute_tensor(full, parameter.device_mesh, parameter.placements)
        parameter.grad = full
    state.optimizer.step()
    state.average.update(state.model)
    state.step = 3

def rank_of(rank, world, how, task):
    dist.init_process_group("gloo", init_method=f"file://{run}/store-{task}-{how}-{world}", rank=rank, world_size=world)
    if task == "write":
        state = spread_out(how, 1)
        take_a_step(state)
        state.metrics = {"step": 3}
        if how == "fsdp":
            assert isinstance(next(iter(state.optimizer.state.values()))["exp_avg"], DTensor)
        with checkpoint.Saver(state, run) as saver:
            saver.save()
        found = {name: whole(tensor).clone() for name, tensor in state.tensors().items()}
        norm = sum(float(whole(parameter).detach().square().sum()) for parameter in state.model.parameters()) ** 0.5
        assert abs(_parameter_norm(state) - norm) < 1e-3 * norm
        if rank == 0:
            torch.save(found, run / "written.pt")
    else:
        state = resumed(spread_out(how, 2), run)
        written = torch.load(run / "written.pt", weights_only=True)
        found = {name: whole(tensor) for name, tensor in state.tensors().items()}
        assert found.keys() == written.keys(), found.keys() ^ written.keys()
        for name, value in written.items():
            assert torch.equal(found[name], value), (world, how, name)
        assert (state.step, state.average.steps, state.metrics) == (3, 1, {"step": 3})
        if world == 2:
            assert torch.equal(state._random["random"][rank], torch.get_rng_state())
    dist.barrier()
    dist.destroy_process_group()

def start(world, how, task):
    fork = multiprocessing.get_context("fork")  # every rank has what is imported here
    ranks = [fork.Process(target=rank_of, args=(rank, world, how, task)) for rank in range(world)]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join()
    assert not any(one.exitcode for one in ranks), (world, how, task)

torch.set_num_threads(1)
start(2, spread, "write")
for world in (1, 2, 4):
    start(world, "ddp" if world == 1 else spread, "read")
start(2, "ddp" if spread == "fsdp" else "fsdp", "read")
meta = checkpoint.saved(run / "checkpoints")[-1].meta()
print(json.dumps({name: len(entry.chunks) for name, entry in meta.tensors.items()}))
"""


@pytest.mark.parametrize("spread", ["ddp", "fsdp"])
def test_any_world_reads_it(tmp_path: Path, make_config: Callable[..., RunConfig], spread: str) -> None:
    """Weights, moments, averages to the bit; each byte is written once, by the rank that has it."""
    run, config = tmp_path / "run", make_config(parallel={"channels_last": False})
    prepare(config, run, 2)
    process = subprocess.Popen(
        [sys.executable, "-c", RANKS, config.model_dump_json(), str(run), spread],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=PATIENCE_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()
    assert process.returncode == 0
    chunks = json.loads(output.splitlines()[-1])
    folder = next((run / "checkpoints").glob("step-*"))
    assert {path.name for path in folder.iterdir()} == {
        "meta.json", "rank-00000.safetensors", "rank-00001.safetensors"
    }  # fmt: skip
    sharded = [name for name, count in chunks.items() if count == 2]
    assert ("model.token_embedding.weight" in sharded) == (spread == "fsdp")
    assert ("optimizer.token_embedding.weight.exp_avg" in sharded) == (spread == "fsdp")
    assert chunks["model.logit_scale"] == 1
