"""Zero-shot classification and retrieval: a planted model, a suite written and read, bad suites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from infra.config import load_toml
from infra.errors import UserError
from shards.order import default_lanes
from train import checkpoint
from train.config import RunConfig
from train.evaluate.retrieval import distinct, recall, retrieval
from train.evaluate.run import evaluate
from train.evaluate.suite import read_suite, write_suite
from train.evaluate.zero_shot import accuracy, classifier
from train.launch import train
from train.models import sizes_of
from train.objectives import check_needs, create_objective

ROOT = Path(__file__).parents[2]
NAMES = ("red", "green", "blue", "orange", "purple", "black")
TEMPLATES = ("a {c} circle", "{c}")
MakeConfig = Callable[..., RunConfig]
Draw = Callable[[str, str, int], bytes]


@pytest.fixture
def suite(tmp_path: Path, drawing: Draw) -> Path:
    """Four circles of each colour."""
    samples = [
        {"key": f"{number:05d}", "png": drawing(NAMES[number % 6], "circle", 500 + number), "cls": number % 6}
        | {"txt": f"a {NAMES[number % 6]} circle"}
        for number in range(24)
    ]
    write_suite(str(tmp_path / "suite"), samples, NAMES, TEMPLATES)
    return tmp_path / "suite"


def test_planted_classifier_is_right() -> None:
    """Texts whose features are planted around known directions: every prompt's mean finds its class."""
    directions = F.normalize(torch.randn(6, 16, generator=torch.Generator().manual_seed(0)), dim=1)

    def encode(texts: Sequence[str]) -> Tensor:
        noise = torch.Generator().manual_seed(len(texts[0]))
        rows = torch.stack([directions[next(k for k, name in enumerate(NAMES) if name in text)] for text in texts])
        return F.normalize(rows + 0.1 * torch.randn(rows.shape, generator=noise), dim=1)

    weights = classifier(encode, NAMES, TEMPLATES)
    assert weights.shape == (6, 16)
    torch.testing.assert_close(weights.norm(dim=1), torch.ones(6))
    targets = torch.arange(6)
    scores = directions @ weights.T
    assert accuracy(scores, targets, 1) == 1
    assert accuracy(scores, (targets + 1) % 6, 1) == 0
    assert accuracy(scores, (targets + 1) % 6, 6) == 1
    assert accuracy(scores[:, :3], torch.zeros(6, dtype=torch.int64), 5) == 1


def test_recall_counts_a_caption_shared_by_pictures() -> None:
    """Two pictures of one caption: either is right for the text."""
    texts, own = distinct(["cat", "dog", "cat"])
    assert texts == ["cat", "dog"]
    assert own.tolist() == [0, 1, 0]
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1]])
    found = retrieval(image, torch.eye(2), own)
    assert found["image_to_text"]["recall@1"] == 1
    assert found["text_to_image"]["recall@1"] == 1
    scores = torch.tensor([[0.1, 0.2, 0.3]])
    belongs = torch.tensor([[True, False, False]])
    assert recall(scores, belongs, (1, 2, 3)) == {"recall@1": 0, "recall@2": 0, "recall@3": 1}


def test_suite_reads_back_as_written(suite: Path) -> None:
    """Names, prompts, classes and captions."""
    read = read_suite(str(suite))
    assert read.names == NAMES
    assert read.templates == TEMPLATES
    assert [example.target for example in read.examples] == [number % 6 for number in range(24)]
    assert read.examples[1].caption == "a green circle"
    assert read.examples[0].image.size == (32, 32)


def test_trained_run_is_measured(tmp_path: Path, suite: Path, make_config: MakeConfig) -> None:
    """A run that saw coloured shapes knows colours; run folder and checkpoint folder give the same."""
    config = make_config(
        length="150 steps",
        augment={"crop_scale": [0.9, 1.0], "hue_degrees": 0},
        optim={"learning_rate": 0.01, "ema": 0.0},
        model={"embed_dim": 16, "vision": {"widths": [8, 16], "depths": [1, 1]}},
        evaluate={"suite": str(suite), "every": "50%"},
        log={"every": "50 steps"},
    )
    train(config, tmp_path / "run", 1)
    result = evaluate(tmp_path / "run", suite)
    assert result["names"] == 6
    assert result["images"] == 24
    assert result["top1"] > 0.5
    assert result["top5"] >= result["top1"]
    assert result["retrieval"]["image_to_text"]["recall@5"] >= result["retrieval"]["image_to_text"]["recall@1"]
    first = result["predictions"][0]
    assert first["key"] == "00000"
    assert first["name"] == "red"
    scores = [entry["score"] for entry in first["top"]]
    assert len(scores) == 5
    assert scores == sorted(scores, reverse=True)
    shares = [entry["probability"] for entry in first["top"]]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 1.001
    newest = checkpoint.saved(tmp_path / "run" / "checkpoints")[-1].path
    assert evaluate(newest, suite) == result
    assert '"zero_shot"' in (tmp_path / "run" / "log.jsonl").read_text()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("classnames.txt", None, "classnames.txt: missing"),
        ("classnames.txt", b"", "classnames.txt: empty"),
        ("classnames.txt", b"red\n", "00001.cls holds '1', not a class from 0 to 0"),
        ("zeroshot_classification_templates.txt", b"a picture\n", "'a picture' has no {c}"),
        ("test/nshards.txt", b"many\n", "'many' is not a number of tars"),
        ("test/nshards.txt", b"2\n", "test/1.tar: missing"),
        ("test/0.tar", b"x" * 600, "test/0.tar: not a sound tar"),
    ],
)
def test_malformed_suite_is_named(suite: Path, file: str, content: bytes | None, message: str) -> None:
    """Each is a UserError that names the file."""
    if content is None:
        (suite / file).unlink()
    else:
        (suite / file).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_suite(str(suite))
    assert message in str(caught.value)


def test_missing_suite_or_checkpoint_is_named(tmp_path: Path, suite: Path) -> None:
    """Nothing there, or a folder without checkpoints; the checkpoint, typed first, is named first."""
    with pytest.raises(UserError, match="no such suite folder"):
        read_suite(str(tmp_path / "no-suite"))
    with pytest.raises(UserError, match="no such folder"):
        evaluate(tmp_path / "no-run", tmp_path / "no-suite")
    with pytest.raises(UserError, match="no such folder"):
        evaluate(tmp_path / "no-run", suite)
    with pytest.raises(UserError, match="holds no checkpoint"):
        evaluate(tmp_path, suite)


def test_recipes_are_valid() -> None:
    """Every recipe that is shipped loads, and its loaders share the lanes on the machines that it is for."""
    recipes = sorted((ROOT / "train" / "recipes").glob("*.toml"))
    assert recipes
    for recipe in recipes:
        config = load_toml(recipe, RunConfig)
        cards = {32768: 128, 4096: 8}.get(config.data.global_batch_size, 2)
        assert default_lanes(config.data.global_batch_size) % (cards * max(1, config.data.workers)) == 0, recipe
        sizes = sizes_of(config.model)
        assert config.data.image_size == getattr(sizes.vit or sizes.resnet, "image_size", config.data.image_size)
        check_needs(config.objective.name, create_objective(**config.objective.model_dump()), config.model)
