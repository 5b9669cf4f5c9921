"""How good is what the quickstart trains, and what does it cost?

Reads the `result.json` of a finished quickstart (runs one into OUT if there is none) and sets its accuracy on
the style never seen beside a strong baseline without any text, measured in the same run: the nearest training
picture by oriented gradients and colours. Prints one JSON object; ratios above 1 mean that the trained model
is better, or cheaper than the limit.

    python benchmarks/quickstart.py [OUT]
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from pairmill.sample_web import archive

LIMIT_S, LIMIT_BYTES = 12 * 60, 6 * 2**30
SIDE, CELLS, ORIENTATIONS = 64, 8, 9


def features(image: Image.Image) -> np.ndarray:
    """Histograms of oriented gradients and mean colours on an 8 x 8 grid, each of unit length: `[768]`."""
    pixels = np.asarray(image.resize((SIDE, SIDE)), dtype=np.float32) / 255
    grey = pixels.mean(axis=2)
    down, across = np.gradient(grey)
    strength = np.hypot(down, across)
    turn = ((np.arctan2(down, across) % np.pi) / np.pi * ORIENTATIONS).astype(int) % ORIENTATIONS
    cell = SIDE // CELLS
    gradients = np.zeros((CELLS, CELLS, ORIENTATIONS), dtype=np.float32)
    rows, columns = np.indices(grey.shape) // cell
    np.add.at(gradients, (rows, columns, turn), strength)
    gradients /= np.linalg.norm(gradients, axis=2, keepdims=True) + 0.1
    colours = pixels.reshape(CELLS, cell, CELLS, cell, 3).mean(axis=(1, 3)) - 0.5
    parts = [part.ravel() / (np.linalg.norm(part) + 1e-6) for part in (gradients, colours)]
    return np.concatenate(parts)


def nearest_picture_top1() -> float:
    """Name every held-out picture after the nearest training picture; return the share named rightly."""
    seen = archive.select("train")
    known = np.stack([features(picture.image()) for picture in seen])
    names = [picture.name for picture in seen]
    unseen_style = archive.select("held_out_style")
    asked = np.stack([features(picture.image()) for picture in unseen_style])
    nearest = (asked @ known.T).argmax(axis=1)
    return float(np.mean([names[at] == picture.name for at, picture in zip(nearest, unseen_style, strict=True)]))


def main() -> None:
    """Run what is missing, measure the baseline, print the ratios."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "quickstart-out")
    if not (out / "result.json").exists():
        subprocess.run([sys.executable, "-m", "pairmill.cli", "quickstart", "--out", str(out)], check=True)
    result = json.loads((out / "result.json").read_text())
    baseline = nearest_picture_top1()
    style, unseen = result["held_out_style"], result["unseen_concepts"]
    seconds = sum(result["seconds"].values())
    print(
        json.dumps(
            {
                "held_out_style_top1": style["top1"],
                "nearest_picture_top1": baseline,
                "times_the_baseline": style["top1"] / baseline,
                "times_chance": style["top1"] * style["names"],
                "unseen_concepts_top1": unseen["top1"],
                "unseen_times_chance": unseen["top1"] * unseen["names"],
                "seconds": seconds,
                "limit_over_seconds": LIMIT_S / seconds,
                "peak_memory_bytes": result["peak_memory_bytes"],
                "limit_over_memory": LIMIT_BYTES / result["peak_memory_bytes"],
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
