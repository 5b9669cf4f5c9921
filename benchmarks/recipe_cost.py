"""What does each recipe take: cards, hours, money?

Samples of the whole run by the speed of one card, times the share of it that many cards keep. A speed that
`benchmarks/train_card.py` printed is given by `--speed ViT-B-32=5400`; without one, the speed aimed at on an H200 in
bfloat16 is taken, and the line says so. The price of a card's hour is yours to give.

    python benchmarks/recipe_cost.py [--speed MODEL=SAMPLES_A_SECOND ...] [--price 3.5] [--kept 0.9] [--epoch 400000000]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from infra.config import load_toml
from train.config import RunConfig
from train.length import in_samples

RECIPES = Path(__file__).parent.parent / "train" / "recipes"
AIMED_AT = {"ViT-B-32": 5600.0, "ViT-B-16": 3000.0, "ViT-L-14": 850.0, "ViT-B-16-SigLIP": 2900.0, "RN50": 2700.0}
"""Samples a second on one H200. ViT: 25, 38 and 45% of its peak of 989 TFLOP/s (NVIDIA's data sheet, dense bfloat16);
SigLIP's B/16 by its FLOPs as CLIP's; RN50: 15% of the peak, as convolutions reach less."""
CARDS = {"ViT-B-32": 64, "ViT-B-16": 64, "ViT-L-14": 128, "ViT-B-16-SigLIP": 64, "RN50": 64}
FEW_CARDS = 8
"""For a batch of 4,096, which more cards would share in parts too small."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", action="append", default=[], help="MODEL=SAMPLES_A_SECOND of one card, measured")
    parser.add_argument("--price", type=float, default=3.5, help="of an hour of one card")
    parser.add_argument("--kept", type=float, default=0.9, help="share of one card's speed that many keep")
    parser.add_argument("--epoch", type=int, default=400_000_000, help="samples of an epoch")
    given = parser.parse_args()
    measured = {name: float(speed) for name, speed in (one.split("=") for one in given.speed)}
    lines = {}
    for path in sorted(RECIPES.glob("*.toml")):
        config = load_toml(path, RunConfig)
        name = config.model.name
        if name not in AIMED_AT:
            continue
        samples = in_samples(config.length, batch=config.data.global_batch_size, epoch=given.epoch)
        cards = CARDS[name] if config.data.global_batch_size > 4096 else FEW_CARDS
        hours = samples / (measured.get(name, AIMED_AT[name]) * given.kept * cards) / 3600
        lines[path.stem] = {
            "samples": samples,
            "a_card_s": measured.get(name, AIMED_AT[name]),
            "is_measured": name in measured,
            "cards": cards,
            "hours": round(hours, 1),
            "card_hours": round(hours * cards),
            "cost": round(hours * cards * given.price),
        }
    print(json.dumps(lines, indent=2))


if __name__ == "__main__":
    main()
