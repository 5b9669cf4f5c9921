"""Between two micro batches a rank under FSDP holds shards of weights and gradients only."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor

from tests.train.forked import become_ranks, run_ranks
from train.gradients import exchanged
from train.model import create_model
from train.parallel import ParallelConfig, parallelize

PATIENCE_S = 120


def hold_shards(_: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = create_model("ViT-nano", 50)
    whole = sum(parameter.numel() for parameter in model.parameters())
    module = parallelize(model, ParallelConfig(strategy="fsdp"))
    side, context = model.visual.image_size, model.context_length
    for number in range(2):
        with exchanged(module, now=number == 1):
            features = module(torch.randn(2, 3, side, side), torch.randint(1, 50, (2, context)))
            (features.image.sum() + features.text.square().sum()).backward()
        sharded = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
        grads = [parameter.grad for parameter in sharded]
        assert all(isinstance(grad, DTensor) for grad in grads)
        held = sum(grad.to_local().numel() for grad in grads if isinstance(grad, DTensor))
        assert held < 0.6 * whole


def test_a_rank_holds_shards_between_micro_batches() -> None:
    run_ranks(__file__, 2, "", PATIENCE_S)


if __name__ == "__main__":
    become_ranks(hold_shards)
