"""What does the tiled loss of a large batch take, beside the whole matrix of logits?

The loss of 32,768 unit features of 512 numbers from each tower, forward and backward, in one process: tile by tile as
in `train.objectives`, and as it is usually written, the matrix in memory and a cross-entropy of its rows and of its
columns (for SigLIP a log-sigmoid of all pairs). Each side runs in processes of its own, in turn. Memory is the kernel's
peak over what the process held with the features made and everything loaded. Time is by the clock and in CPU seconds,
the least of the repeats; ratios take the CPU's, which others on the machine bend less.

The matrix takes more than four times its own size, 17.4 GB for 32,768 pairs. Where so much is free, both sides are
measured at that size (`extrapolated` is false). Where it is not, or with `--whole-rows`, the matrix is measured with
fewer rows: its memory counts times the square of what is missing, and its time is set against a tiled loss of the same
size. Prints one JSON object; ratios above 1 mean that the tiled loss takes less.

    python benchmarks/loss_memory.py [--rows 32768] [--whole-rows 0] [--width 512] [--threads 2] [--repeats 2]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

OBJECTIVES = ("clip", "siglip")
SCALE, BIAS, SIGNAL = 50.0, -10.0, 0.3
WHOLE_COPIES, SPARE_BYTES = 4.2, 1.5 * 2**30
"""Matrices that the whole one takes at its peak; what is left to others on the machine."""


def measured(side: str, name: str, rows: int, width: int, threads: int, tile: int | str) -> dict[str, float]:
    """Differentiate one loss in this process; return its value, bytes and seconds."""
    import torch
    from torch.nn import functional as F

    from train.model import Features
    from train.objectives import create_objective

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    loss_of = create_objective(name, tile=tile) if side == "tiled" else None

    # Should memory be short after all, this process is to end, not another's.
    Path("/proc/self/oom_score_adj").write_text("1000")

    def differentiated(rows: int) -> dict[str, float]:
        image = F.normalize(torch.randn(rows, width), dim=1).requires_grad_()
        text = F.normalize(SIGNAL * image.detach() + torch.randn(rows, width) * width**-0.5, dim=1).requires_grad_()
        given = [image, text, *(torch.tensor(value, requires_grad=True) for value in (SCALE, BIAS))]
        Path("/proc/self/clear_refs").write_text("5")
        before, clock, cpu = _resident_bytes("VmRSS"), time.monotonic(), time.process_time()
        if loss_of is None:
            loss = _whole(name, *given)
        else:
            loss = loss_of(Features(*given), torch.empty(rows, 1, dtype=torch.long))[0]
        loss.backward()
        return {
            "loss": loss.item(),
            "seconds": time.monotonic() - clock,
            "cpu_seconds": time.process_time() - cpu,
            "bytes": _resident_bytes("VmHWM") - before,
        }

    differentiated(64)
    return differentiated(rows)


def _whole(name: str, image: Any, text: Any, scale: Any, bias: Any) -> Any:
    import torch
    from torch.nn import functional as F

    if name == "siglip":
        signs = torch.full((len(image), len(text)), -1.0)
        signs.fill_diagonal_(1.0)
        return -F.logsigmoid(signs * (scale * image @ text.T + bias)).sum() / len(image)
    logits, own = scale * image @ text.T, torch.arange(len(image))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def _resident_bytes(what: str) -> int:
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def fitting_rows(rows: int) -> int:
    """Return the most rows, `rows` halved as often as need be, whose whole matrix fits into the memory that is free."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    free = int(found[1]) * 1024 - SPARE_BYTES
    while WHOLE_COPIES * 4 * rows**2 > free:
        rows //= 2
    return rows


def in_a_process(**given: Any) -> dict[str, float]:
    """Run `measured` in a new process."""
    command = [sys.executable, __file__, "--measure", json.dumps(given)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def compared(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Measure one objective on both sides, the repeats in turn."""
    sides = {
        "tiled": ("tiled", given.rows),
        "tiled_small": ("tiled", given.whole_rows),
        "whole": ("whole", given.whole_rows),
    }
    if given.rows == given.whole_rows:
        del sides["tiled_small"]
    runs: dict[str, list[dict[str, float]]] = {what: [] for what in sides}
    for _ in range(given.repeats):
        for what, (side, rows) in sides.items():
            shape = {"rows": rows, "width": given.width, "threads": given.threads, "tile": given.tile}
            runs[what].append(in_a_process(side=side, name=name, **shape))
    least = {
        what: {key: min(run[key] for run in found) for key in ("loss", "seconds", "cpu_seconds", "bytes")}
        for what, found in runs.items()
    }
    tiled, whole = least["tiled"], least["whole"]
    alike = least.get("tiled_small", tiled)
    whole_bytes = whole["bytes"] * (given.rows / given.whole_rows) ** 2
    return least | {
        "extrapolated": given.rows != given.whole_rows,
        "whole_bytes": whole_bytes,
        "memory_share": tiled["bytes"] / whole_bytes,
        "time_share": alike["cpu_seconds"] / whole["cpu_seconds"],
        "time_share_by_the_clock": alike["seconds"] / whole["seconds"],
        "whole_over_tiled_bytes": whole_bytes / tiled["bytes"],
        "whole_over_tiled_cpu_seconds": whole["cpu_seconds"] / alike["cpu_seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32_768)
    parser.add_argument("--whole-rows", type=int, default=0, help="of the whole matrix; 0: all if they fit")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tile", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=OBJECTIVES)
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measured(**given.measure)))
        return
    given.whole_rows = given.whole_rows or fitting_rows(given.rows)
    sizes = {key: getattr(given, key) for key in ("rows", "whole_rows", "width", "tile", "threads", "repeats")}
    print(json.dumps(sizes | {name: compared(name, given) for name in given.objectives}, indent=2))


if __name__ == "__main__":
    main()
