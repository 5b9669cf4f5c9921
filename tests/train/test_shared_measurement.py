"""Zero-shot accuracy while training: every rank measures its share of the suite, and all know the whole."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from train.config import RunConfig
from train.evaluate.run import evaluate
from train.evaluate.suite import write_suite
from train.launch import prepare, train

ROOT = Path(__file__).parents[2]
MakeConfig = Callable[..., RunConfig]
Draw = Callable[[str, str, int], bytes]
NAMES = ("red", "green", "blue", "orange", "purple", "black")
PATIENCE_S = 120
RANK = """
import json, sys
from functools import partial
from pathlib import Path
import torch
import torch.distributed as dist
from infra.config import parse
from train.config import RunConfig
from train.evaluate import suite as suites
from train.evaluate.run import Encoder, measure
from train.evaluate.suite import read_suite
from train.evaluate.together import Measurement, by_all_ranks
from train.state import build
from train.tokenizer import load_tokenizer
from infra.storage import Folder

config, run, rank = parse(json.loads(sys.argv[1]), RunConfig, source="test"), Path(sys.argv[2]), int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{run}/store", rank=rank, world_size=2)
state = build(config, run)
torch.manual_seed(7 * rank + 2)
with torch.no_grad():
    for parameter in state.model.parameters():
        parameter.normal_(std=0.3)
decoded, picture = [], suites._picture
suites._picture = lambda folder, one: decoded.append(one.key) or picture(folder, one)
tables, read_tar = [], suites._examples
suites._examples = lambda folder, classes, tar: tables.append(tar) or read_tar(folder, classes, tar)
measured = Measurement(state, run)
found = measured()
decoded_once = sorted(decoded)
measured()
seen = {"decoded": decoded_once, "tables": list(tables)}
encoder = Encoder(state.model, load_tokenizer(Folder(run)), config, state.device)
suite = read_suite(config.evaluate.suite)
encode = partial(encoder.images, suite)
together, alone = by_all_ranks(encode, suite.examples), encode(suite.examples)
own = [bool(torch.allclose(*pair, atol=1e-4)) for pair in zip(together, alone)]
torch.manual_seed(3)
with torch.no_grad():
    for parameter in state.model.parameters():
        parameter.normal_(std=0.3)
shared = measured()
alone = measure(state.model, load_tokenizer(Folder(run)), suite, config)
print(json.dumps({"found": found, "own": own, "shared": shared, "alone": alone} | seen))
dist.destroy_process_group()
"""


def write(folder: Path, drawing: Draw, pictures: int, first: int = 0) -> str:
    samples = [
        {
            "key": f"{number:05d}",
            "png": drawing(NAMES[number % 6], "circle", 500 + number),
            "cls": math.isqrt(number) % 6,
            "txt": f"a {NAMES[number % 6]} circle, number {number}",
        }
        for number in range(first, first + pictures)
    ]
    write_suite(str(folder), samples, NAMES, ("a {c} circle",))
    return str(folder)


def test_each_rank_measures_its_share(tmp_path: Path, drawing: Draw, make_config: MakeConfig) -> None:
    """Two ranks: each reads a tar's table, once for all times, and its own pictures; they find what one finds.

    With other weights on each, a picture's features are those of the rank it belongs to; both report the same.
    """
    suite = write(tmp_path / "suite", drawing, 40)
    write(tmp_path / "more", drawing, 21, first=40)
    shutil.copy(tmp_path / "more" / "test" / "0.tar", tmp_path / "suite" / "test" / "1.tar")
    (tmp_path / "suite" / "test" / "nshards.txt").write_text("2\n")
    config = make_config(optim={"ema": 0.0}, evaluate={"suite": suite})
    first, second = by_two_ranks(config, tmp_path / "run")
    assert first["found"] == second["found"]
    assert first["own"] == [number % 2 == 0 for number in range(61)]
    assert second["own"] == [number % 2 == 1 for number in range(61)]
    assert first["tables"] == ["test/0.tar"]
    assert second["tables"] == ["test/1.tar"]
    assert first["decoded"] == [f"{number:05d}" for number in range(0, 61, 2)]
    # Ranks encode equally many, so the last of 61 has one that is rank 0's.
    assert second["decoded"] == sorted([f"{number:05d}" for number in range(1, 61, 2)] + ["00000"])
    alone = first["alone"]
    expected = {"zero_shot": alone["top1"], "zero_shot_top5": alone["top5"]} | recalls(alone)
    assert first["shared"] == second["shared"] == pytest.approx(expected)


def test_a_suite_of_captions_alone_is_shared_too(tmp_path: Path, drawing: Draw, make_config: MakeConfig) -> None:
    """Five captions a picture and no classes: recalls, no accuracy, and the same as one process finds."""
    samples = [
        {"key": str(number), "png": drawing(NAMES[number % 6], "line", number)}
        | {"txt": "\n".join(f"{NAMES[number % 6]} line {number}, {word}" for word in NAMES[:5])}
        for number in range(13)
    ]
    write_suite(str(tmp_path / "suite"), samples, (), ())
    config = make_config(optim={"ema": 0.0}, evaluate={"suite": str(tmp_path / "suite")})
    first, second = by_two_ranks(config, tmp_path / "run")
    assert len(recalls(first["alone"])) == 6
    assert first["shared"] == second["shared"] == pytest.approx(recalls(first["alone"]))
    assert "top1" not in first["alone"]


def by_two_ranks(config: RunConfig, run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What each of two ranks says."""
    prepare(config, run, 2)
    command = [sys.executable, "-c", RANK, config.model_dump_json(), str(run)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.PIPE) for rank in range(2)]
    try:
        first, second = (json.loads(rank.communicate(timeout=PATIENCE_S)[0]) for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return first, second


def recalls(alone: dict[str, Any]) -> dict[str, float]:
    """As the log names them."""
    return {f"{way}_{name}": share for way, both in alone["retrieval"].items() for name, share in both.items()}


@pytest.mark.parametrize("pictures", [1, 13])
@pytest.mark.slow
def test_the_log_has_the_whole_suites_measures(
    tmp_path: Path, drawing: Draw, make_config: MakeConfig, pictures: int
) -> None:
    """One process or two, with more pictures than ranks or fewer: what the log has, measuring the run again gives."""
    suite = write(tmp_path / "suite", drawing, pictures)
    found = []
    for world_size in (1, 2):
        run = tmp_path / f"run{world_size}"
        train(make_config(length="2 steps", evaluate={"suite": suite, "every": "1 steps"}), run, world_size)
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        found.append([line for line in lines if "zero_shot" in line])
        newest = evaluate(run, suite)
        assert found[-1][-1]["zero_shot"] == pytest.approx(newest["top1"])
        for way in ("image_to_text", "text_to_image"):
            for name, share in newest["retrieval"][way].items():
                assert found[-1][-1][f"{way}_{name}"] == pytest.approx(share)
    # Not the same numbers: one rounding of two trainings' may put near ties in another order.
    assert [line.keys() for line in found[0]] == [line.keys() for line in found[1]]
    assert len(found[0]) == 2
