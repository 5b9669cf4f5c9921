"""Zero-shot classification and retrieval: a planted model, a suite written and read, bad suites."""

from __future__ import annotations

import shutil
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
from train.launch import prepare, train
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
    texts, own = distinct([("cat",), ("dog",), ("cat",)])
    assert texts == ["cat", "dog"]
    assert own.int().tolist() == [[1, 0], [0, 1], [1, 0]]
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
    assert read.examples[1].captions == ("a green circle",)
    assert (
        list(read.pictures(read.examples[:2], lambda picture: (picture.size, picture.mode))) == [((32, 32), "RGB")] * 2
    )


def test_a_name_or_caption_may_hold_other_line_separators(tmp_path: Path, drawing: Draw) -> None:
    names, captions = ["a\u2028b", "c\x85d"], ["one\x1cpicture", "of\x0btwo\u2029lines"]
    sample = {"key": "0", "png": drawing("red", "line", 0), "cls": 1, "txt": "\r\n".join(captions)}
    write_suite(str(tmp_path / "suite"), [sample], names, ["a picture\x0cof {c}"])
    read = read_suite(str(tmp_path / "suite"))
    assert (list(read.names), list(read.templates)) == (names, ["a picture\x0cof {c}"])
    assert list(read.examples[0].captions) == captions


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


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (".", None, "no such suite folder"),
        ("test/0.tar", b"x" * 600, "test/0.tar: not a sound tar"),
        ("classnames.txt", b"red\n", "not a class from 0 to 0"),
        ("test/nshards.txt", b"0\n", "holds no pictures"),
        ("test/nshards.txt", "²\n".encode(), "is not a number of tars"),
        ("picture", b"\x89PNG\r\n\x1a\n", "00003.png is not a picture"),
    ],
)
def test_run_does_not_begin_with_a_suite_that_cannot_be_measured(
    tmp_path: Path, suite: Path, make_config: MakeConfig, file: str, content: bytes | None, message: str
) -> None:
    """Nothing has been done for it yet; a suite that is one file is named too."""
    if file == "picture":
        data = (suite / "test" / "0.tar").read_bytes()
        where = data.index(b"IDAT", data.index(b"00003.png"))
        (suite / "test" / "0.tar").write_bytes(data[:where] + b"damaged!" + data[where + 8 :])
    elif content is None:
        shutil.rmtree(suite)
    else:
        (suite / file).write_bytes(content)
    config = make_config(evaluate={"suite": str(suite)})
    with pytest.raises(UserError) as caught:
        train(config, tmp_path / "run", 1)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "config.json").exists()


def test_suite_that_is_a_file_is_named(suite: Path) -> None:
    """It is there, and no folder."""
    with pytest.raises(UserError, match=r"classnames.txt: cannot be read"):
        read_suite(str(suite / "classnames.txt"))


def test_run_goes_on_with_another_suite_and_pace(tmp_path: Path, suite: Path, make_config: MakeConfig) -> None:
    """How often it is measured is no part of what a run is."""
    run = tmp_path / "run"
    prepare(make_config(evaluate={"suite": str(suite), "every": "50%"}), run, 1)
    assert prepare(make_config(evaluate={"suite": str(suite), "every": "2 steps"}), run, 1) is None
    assert prepare(make_config(), run, 1) is None
    # What has been looked at is not decoded again at each start, and what is new is.
    write_suite(str(tmp_path / "other"), [{"key": "0", "png": b"none", "cls": 0}], NAMES, TEMPLATES)
    with pytest.raises(UserError, match=r"0\.png is not a picture"):
        prepare(make_config(evaluate={"suite": str(tmp_path / "other")}), run, 1)


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
