"""Is it open_clip's model? The same weights in both: strict loading either way, features, logits, gradients.

Prints one JSON object: for each model the largest differences, and `ratio`, the largest of all over the tolerance
(1 or less is wanted). Gradients are those of CLIP's loss, compared one by one and as one vector on its own scale.
ResNets are compared with the statistics of the batch and with the running ones.

    python benchmarks/open_clip_parity.py [--models ViT-B-32 RN50] [--batch 4]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import peers
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train.model import DualEncoder, create_model

TOLERANCE = 1e-5
LOGIT_SCALE = 14.0


def randomised(model: DualEncoder) -> DualEncoder:
    """Give every weight and statistic a value that tells: none is left at 0 or 1."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif value.is_floating_point() and name != "logit_scale":
                value.add_(0.02 * torch.randn_like(value))
                if name.endswith("bn3.weight"):  # at 0, where it begins, nothing of a block is seen
                    value.fill_(0.2)
    return model


def outcome(model: nn.Module, images: Tensor, tokens: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return features and logits, and the loss' gradient by parameter."""
    model.zero_grad(set_to_none=True)
    image = F.normalize(model.encode_image(images), dim=-1)  # type: ignore[operator]
    text = F.normalize(model.encode_text(tokens), dim=-1)  # type: ignore[operator]
    logits = LOGIT_SCALE * image @ text.T
    target = torch.arange(len(images))
    ((F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2).backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return {"image": image.detach(), "text": text.detach(), "logits": logits.detach()}, gradients


def norm(tensors: dict[str, Tensor]) -> Tensor:
    """Return the length of all of them as one vector."""
    return torch.stack([value.norm() for value in tensors.values()]).norm()


def compare(name: str, batch: int, folder: Path) -> dict[str, Any]:
    """Return the largest differences between our model and open_clip's of that name."""
    torch.manual_seed(0)
    ours = randomised(create_model(name))
    theirs = peers.open_clip_model(folder, name)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    side = ours.image_size
    assert side is not None
    images = torch.randn(batch, 3, side, side)
    tokens = torch.randint(1, 49406, (batch, ours.context_length))
    for row, length in zip(tokens, range(5, 5 + batch), strict=True):
        row[length], row[length + 1 :] = 49407, 0
    result: dict[str, Any] = {"parameters": sum(value.numel() for value in ours.parameters()), "loads_strictly": True}
    for mode in ("training", "evaluation") if name.startswith("RN") else ("training",):
        for model in (ours, theirs):
            model.train(mode == "training")
        (mine, my_gradients), (other, other_gradients) = (outcome(model, images, tokens) for model in (ours, theirs))
        assert my_gradients.keys() == other_gradients.keys()
        differences = {key: (mine[key] - other[key]).abs().max().item() for key in mine}
        apart = {key: my_gradients[key] - other_gradients[key] for key in my_gradients}
        differences["gradients"] = max(value.abs().max().item() for value in apart.values())
        differences["gradients_by_norm"] = (norm(apart) / norm(other_gradients)).item()
        result[mode] = differences
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["ViT-B-32", "RN50"], help="open_clip's names")
    parser.add_argument("--batch", type=int, default=4, help="pairs")
    parser.add_argument("--open-clip", type=Path, default=peers.OPEN_CLIP_FOLDER, help=f"folder with {peers.OPEN_CLIP}")
    given = parser.parse_args()
    results = {name: compare(name, given.batch, given.open_clip) for name in given.models}
    largest = max(
        value
        for result in results.values()
        for mode in ("training", "evaluation")
        for value in result.get(mode, {}).values()
    )
    print(
        json.dumps({"peer": peers.OPEN_CLIP, "models": results, "tolerance": TOLERANCE, "ratio": largest / TOLERANCE})
    )


if __name__ == "__main__":
    main()
