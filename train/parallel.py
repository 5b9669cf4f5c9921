"""Where a model computes and how it is spread over processes, in one visible order."""

from __future__ import annotations

import inspect
import os
from contextlib import nullcontext
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from infra.config import Config, knob
from infra.errors import UserError
from train.collectives import any_rank, gather_states, mean_over_ranks, rank, world_size
from train.model import DualEncoder
from train.statistics import average_buffers, batch_norms, put_aside

__all__ = [
    "any_rank",
    "average_buffers",
    "chosen_device",
    "gather_states",
    "is_kept_whole",
    "mean_over_ranks",
    "parallelize",
    "process_group_backend",
    "rank",
    "world_size",
]

WEEK_S = 7 * 86_400
COMPILED_VARIANTS = 64
"""Versions of one block's code that are compiled before the rest runs uncompiled; the towers share that code."""


class ParallelConfig(Config):
    """How the model is computed."""

    precision: Literal["auto", "bfloat16", "float32"] = Field(
        default="auto",
        description="arithmetic of the towers (auto: bfloat16 where the processor has it); "
        "weights, optimiser and loss stay in float32",
    )
    channels_last: bool = Field(
        default=True, description="keep pictures as [B, H, W, C] in memory, which convolutions prefer"
    )
    strategy: Literal["ddp", "fsdp"] = knob(
        "ddp", "ranks each hold the whole model (ddp), or shards of it and of the optimiser's state (fsdp)"
    )
    shard: int = knob(
        0, "ranks that hold one model together; such groups are replicas (hybrid sharding). 0: all ranks", ge=0
    )
    cpu_offload: bool = knob(False, "keep shards and the optimiser's state in the memory of the CPU")
    checkpoint_activations: bool = knob(
        False, "keep the inputs of blocks only, and compute what is in them again in the backward pass"
    )
    compile: bool = knob(False, "compile each block with torch.compile, which takes minutes at the start")
    micro_batch: int = knob(
        0, "samples a rank encodes at once, without a change of the gradient, each twice; 0: all of its batch", ge=0
    )
    deterministic: bool = knob(
        False, "only operations that give the same bits each time, on cards too; one that has no such form ends the run"
    )
    threads: int = knob(0, "CPU threads of each rank; 0: the machine's cores shared out evenly", ge=0)
    timeout_s: float = knob(600.0, "seconds a collective may wait for a rank before the run ends", ge=1, le=WEEK_S)

    @model_validator(mode="after")
    def _sharding_needs_fsdp(self) -> ParallelConfig:
        for name in ("shard", "cpu_offload"):
            if self.strategy == "ddp" and getattr(self, name):
                raise ValueError(f"{name} says how a model is sharded: set strategy = 'fsdp' with it, or leave it out")
        return self


REPLICATED, CPU = ParallelConfig(), torch.device("cpu")


def chosen_device() -> torch.device:
    """Return this rank's device: the graphics card of its number on this machine, or the CPU where there is none.

    Raises:
        UserError: more ranks on this machine than cards.
    """
    if not torch.cuda.is_available():
        return CPU
    number, cards = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= cards:
        raise UserError(f"rank {number} of this machine has no card: it has {cards}; start at most {cards} processes")
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def process_group_backend() -> str:
    """Return what carries messages: gloo, and NCCL for what lies on graphics cards."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def parallelize(
    model: DualEncoder,
    config: ParallelConfig = REPLICATED,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Return the module the loop calls: `model` itself, changed in place, or `model` under data parallelism.

    Every rank must call it with the same weights. Names of parameters and buffers stay as they are.

    Args:
        model: a model on `device`.
        config: what to do.
        device: where this rank computes.
        dtype: arithmetic of the towers; FSDP gathers weights in it.

    Raises:
        UserError: the options do not fit the world size.
    """
    blocks = model.blocks()
    if config.compile:
        _prepare_compiler()
    for block in blocks:
        if config.checkpoint_activations:
            _recompute(block, compiled=config.compile)
        if config.compile:
            block.compile()
    if world_size() == 1:
        if config.cpu_offload:
            raise UserError(
                "parallel.cpu_offload: one process has no shards to offload; start two or more, or unset it"
            )
        return model
    if config.strategy == "fsdp":
        return _shard(model, blocks, config, device, dtype)
    # Buffers are not broadcast: `average_buffers` keeps them equal, which for running statistics is exact and
    # for rank 0's alone would not be.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    broadcast = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {broadcast: False}
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **options)


def _recompute(block: nn.Module, compiled: bool) -> None:
    """Keep a block's input only, and compute the rest again in the backward pass (Chen et al. 2016, section 4)."""
    forward = block.forward
    options: dict[str, Any] = {"use_reentrant": False}

    def recomputed(*inputs: Tensor) -> Tensor:
        return checkpoint(forward, *inputs, **options)

    if batch_norms(block):
        # The second time is no second batch. Compiled code enters no contexts, so they go around it.
        options["context_fn"] = lambda: (nullcontext(), put_aside(block))
        forward = torch.compile(forward) if compiled else forward
        recomputed = torch.compiler.disable(recomputed)
    block.forward = recomputed


def _prepare_compiler() -> None:
    import torch._dynamo

    torch._dynamo.config.recompile_limit = COMPILED_VARIANTS
    # It cuts graphs so that gradients leave early; blocks are cut already, and it refuses checkpoints.
    torch._dynamo.config.optimize_ddp = False


def _shard(
    model: DualEncoder, blocks: list[nn.Module], config: ParallelConfig, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """Shard each block, then what is left (Rajbhandari et al. 2020, "ZeRO", stage 3)."""
    for parameter in model.parameters():
        # What is sharded has to lie row by row, convolutions' channels-last weights too.
        parameter.data = parameter.data.contiguous()
    options: dict[str, Any] = {
        "mesh": _mesh(config.shard, device),
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        if dtype != torch.float32
        else MixedPrecisionPolicy(),
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type != "cpu") if config.cpu_offload else OffloadPolicy(),
        "ignored_params": {parameter for name, parameter in model.named_parameters() if is_kept_whole(model, name)},
    }
    for module in (*blocks, model):
        sharded = fully_shard(module, **options)
        # gloo sums only.
        sharded.set_force_sum_reduction_for_comms(device.type == "cpu")
    for method in ("encode_image", "encode_text"):
        register_fsdp_forward_method(model, method)
    return model


def _mesh(shard: int, device: torch.device) -> DeviceMesh:
    """Return the ranks as one row, or as groups of `shard` that each hold the whole model."""
    world = world_size()
    if shard in (0, world):
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    if world % shard:
        raise UserError(
            f"parallel.shard: groups of {shard} ranks do not divide a world of {world}; take a divisor of {world}"
        )
    return init_device_mesh(device.type, (world // shard, shard), mesh_dim_names=("replicate", "shard"))


def is_kept_whole(model: nn.Module, name: str) -> bool:
    """Tell whether FSDP leaves the parameter of that name whole on every rank, in float32.

    Scalars cannot be sharded, and normalisation over a batch takes its scales in the type of its statistics.
    """
    owner, _, _ = name.rpartition(".")
    return model.get_parameter(name).ndim == 0 or isinstance(model.get_submodule(owner), _BatchNorm)
