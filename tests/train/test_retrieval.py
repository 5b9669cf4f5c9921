"""Retrieval on suites as CLIP_benchmark exports COCO and Flickr: a caption a line, several a picture, no classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from infra.errors import UserError
from infra.storage import Folder
from pairmill import show
from train.config import RunConfig
from train.evaluate.retrieval import distinct, retrieval
from train.evaluate.run import Encoder, measure
from train.evaluate.suite import read_suite, write_suite
from train.launch import prepare
from train.state import build
from train.tokenizer import load_tokenizer

NAMES = ("red", "green", "blue", "orange", "purple", "black")
CUTS = (1, 5, 10)
MakeConfig = Callable[..., RunConfig]
Draw = Callable[[str, str, int], bytes]


def brute_force(
    images: NDArray[np.float32], texts: NDArray[np.float32], picture_of: list[int]
) -> dict[str, dict[str, float]]:
    """Recalls by looking at every picture and every caption; `picture_of` names each caption's picture."""
    scores, found = images @ texts.T, {"image_to_text": {}, "text_to_image": {}}
    for cut in CUTS:
        by_image = [
            any(picture_of[text] == row for text in np.argsort(-scores[row])[:cut]) for row in range(len(images))
        ]
        by_text = [picture_of[text] in np.argsort(-scores[:, text])[:cut] for text in range(len(texts))]
        found["image_to_text"][f"recall@{cut}"] = float(np.mean(by_image))
        found["text_to_image"][f"recall@{cut}"] = float(np.mean(by_text))
    return found


@settings(deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=30), st.integers(0, 2**20))
def test_recall_is_that_of_a_brute_force(counts: list[int], seed: int) -> None:
    captions = [tuple(f"{picture}, {number}" for number in range(count)) for picture, count in enumerate(counts)]
    owners = [picture for picture, own in enumerate(captions) for _ in own]
    draw = np.random.default_rng(seed)
    images = draw.normal(size=(len(counts), 8)).astype(np.float32)
    texts = images[owners] + draw.normal(size=(len(owners), 8)).astype(np.float32)
    names, belongs = distinct(captions)
    assert names == [text for own in captions for text in own]
    found = retrieval(torch.from_numpy(images), torch.from_numpy(texts), belongs)
    expected = brute_force(images, texts, owners)
    for way, shares in expected.items():
        assert found[way] == pytest.approx(shares)


@pytest.fixture
def captioned(tmp_path: Path, drawing: Draw) -> Path:
    """Thirteen pictures of five captions, with empty lines between."""
    samples = [
        {"key": str(number), "png": drawing(NAMES[number % 6], "line", number)}
        | {"txt": "\n\n".join(f"{NAMES[number % 6]} line {number}, {word}" for word in NAMES[:5]) + "\n \n"}
        for number in range(13)
    ]
    write_suite(str(tmp_path / "suite"), samples, (), ())
    return tmp_path / "suite"


def test_every_line_is_a_caption(tmp_path: Path, captioned: Path, make_config: MakeConfig) -> None:
    """What is measured with a model is what the model's features give by brute force; there is no accuracy."""
    suite, run = read_suite(str(captioned)), tmp_path / "run"
    assert not (captioned / "classnames.txt").exists()
    assert suite.examples[2].captions == tuple(f"blue line 2, {word}" for word in NAMES[:5])
    config = make_config(evaluate={"suite": str(captioned)})
    prepare(config, run, 1)
    model, tokenizer = build(config, run).model, load_tokenizer(Folder(run))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    found = measure(model, tokenizer, suite, config)
    encoder = Encoder(model, tokenizer, config, torch.device("cpu"))
    texts = encoder.texts([text for example in suite.examples for text in example.captions])
    images = encoder.images(suite, suite.examples)
    expected = brute_force(images.numpy(), texts.numpy(), [number // 5 for number in range(65)])
    for way, shares in expected.items():
        assert found["retrieval"][way] == pytest.approx(shares)
    assert found.keys() == {"names", "images", "retrieval", "predictions"}
    assert (found["names"], found["images"], found["predictions"]) == (0, 13, [])


def test_recalls_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Beside a suite that has accuracies."""
    recalls = {way: {"recall@1": 0.25} for way in ("image_to_text", "text_to_image")}
    show.evaluations([
        {"suite": "a", "names": 0, "images": 13, "retrieval": recalls},
        {"suite": "b", "names": 6, "images": 24, "top1": 0.5, "top5": 1.0, "retrieval": None},
    ])  # fmt: skip
    shown = capsys.readouterr().out
    assert shown.count("25.0%") == 2
    assert "50.0%" in shown


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"txt": "a"}, {}, r"0.tar: 1 has neither a class .* nor a caption"),
        ({"txt": "a"}, {"txt": "\n \n"}, r"0.tar: 1 has neither a class .* nor a caption"),
        ({"txt": "a", "cls": "0"}, {"txt": "b", "cls": "0"}, r"0.cls holds '0', but classnames.txt: missing"),
    ],
)
def test_a_suite_without_classes_needs_captions(
    tmp_path: Path, drawing: Draw, first: dict[str, Any], second: dict[str, Any], message: str
) -> None:
    """And one with classes their names."""
    picture = drawing("red", "circle", 1)
    samples = [{"key": str(number), "png": picture} | own for number, own in enumerate((first, second))]
    write_suite(str(tmp_path), samples, (), ())
    with pytest.raises(UserError, match=message) as caught:
        read_suite(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_class_for_some_pictures_is_named(tmp_path: Path, drawing: Draw) -> None:
    picture = drawing("red", "circle", 1)
    write_suite(
        str(tmp_path),
        [{"key": "0", "png": picture, "cls": 0}, {"key": "1", "png": picture, "txt": "a"}],
        NAMES,
        ("{c}",),
    )
    with pytest.raises(UserError, match=r"0.tar: 1 has no 1.cls, as other pictures have"):
        read_suite(str(tmp_path))
