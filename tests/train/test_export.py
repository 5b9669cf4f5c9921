"""A trained run as a folder: loaded by transformers and by open_clip's class, it gives the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel, CLIPTokenizer, PreTrainedTokenizerBase

from infra.config import parse
from infra.errors import UserError
from train import huggingface, open_clip
from train.config import RunConfig
from train.evaluate.run import load_model
from train.export import export
from train.launch import train
from train.model import DualEncoder, ModelConfig, create_model
from train.tokenizer import ClipTokenizer, Tokenizer
from train.tokenizer_files import tokenizer_files

TEXTS = ["a red circle", "A  blue\tSquare, number 7", "green line é 😀", "a red circle " * 30, "a <|endoftext|> b"]


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step of a small ViT."""
    raw: dict[str, Any] = {
        "length": "1 steps",
        "data": {"folder": str(corpus), "global_batch_size": 16, "image_size": 32},
        "tokenizer": {"vocabulary": 320},
        "model": {"name": "ViT-nano"},
        "parallel": {"precision": "float32", "threads": 1},
    }
    folder = tmp_path_factory.mktemp("export") / "run"
    train(parse(raw, RunConfig, source="test"), folder, 1)
    return folder


def logits(model: DualEncoder, images: Tensor, tokens: Tensor) -> Tensor:
    """Of every picture with every text."""
    features = model.eval()(images, tokens)
    return features.logit_scale * features.image @ features.text.T


def whole(tokenizer: Tokenizer, context: int) -> Tensor:
    """Token ids `[B, context]` of the texts."""
    rows = [tokenizer.encode(text, context) for text in TEXTS]
    return torch.tensor([row + [0] * (context - len(row)) for row in rows])


def test_hugging_faces_folder_loads_with_transformers(run: Path, tmp_path: Path) -> None:
    """Same ids, same logits."""
    result = export(run, "huggingface", tmp_path / "out")
    model, tokenizer, _, _ = load_model(run)
    assert sorted(result["files"]) == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert result["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    peer, report = CLIPModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    words: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = words(TEXTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ids, whole(tokenizer, model.context_length))
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        theirs = peer.eval()(input_ids=ids, pixel_values=images).logits_per_image
        torch.testing.assert_close(theirs, logits(model, images, ids), rtol=1e-5, atol=1e-5)
    pictures = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert pictures["crop_size"] == {"height": 32, "width": 32}


def test_open_clips_folder_loads_with_its_class(run: Path, tmp_path: Path, peers: Any) -> None:
    """Strictly, with the same logits; its tokenizer is found beside it."""
    export(run, "open_clip", tmp_path / "out")
    model, tokenizer, _, _ = load_model(run)
    settings = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())["model_cfg"]
    assert settings["text_cfg"].pop("hf_tokenizer_name")
    peer = peers.open_clip_class(peers.OPEN_CLIP_FOLDER)(**settings).eval()
    peer.load_state_dict(load_file(tmp_path / "out" / "open_clip_model.safetensors"), strict=True)
    images, ids = torch.randn(3, 3, 32, 32), whole(tokenizer, model.context_length)
    with torch.no_grad():
        theirs = peer.get_logits(images, ids)[0]
        torch.testing.assert_close(theirs, logits(model, images, ids), rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(TEXTS[0]).input_ids == tokenizer.encode(TEXTS[0], 16)


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16-quickgelu", "ViT-L-14-336", "RN50", "RN50x4-quickgelu"])
def test_open_clips_configuration_is_its_own(name: str, peers: Any) -> None:
    """What is written for a named model builds the model of that name."""
    ours = create_model(name, device="meta")
    with torch.device("meta"):
        theirs = peers.open_clip_class(peers.OPEN_CLIP_FOLDER)(**open_clip.model_settings(ours))
        named = peers.open_clip_model(peers.OPEN_CLIP_FOLDER, name)
    assert str(theirs) == str(named)


def test_clips_vocabulary_is_written_as_files(tmp_path: Path) -> None:
    """CLIPTokenizer gives the same ids."""
    tokenizer = ClipTokenizer()
    for name, text in tokenizer_files(tokenizer, 77).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    words = CLIPTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert words(text, truncation=True).input_ids == tokenizer.encode(text, 77)


def test_a_model_without_a_place_is_named() -> None:
    """Hugging Face's classes know no ResNet, open_clip no small residual tower and no tower of SigLIP's but timm's."""
    for name in ("RN10-tiny", "RN-nano"):
        with pytest.raises(UserError, match="no class of Hugging Face's holds a dual encoder with a ResNet"):
            huggingface.model_settings(create_model(name, 50))
    for name, reason in (("RN10-tiny", "our own small residual one"), ("SigLIP-nano", "export it as huggingface")):
        with pytest.raises(UserError, match=f"open_clip has no place for this model: .*{reason}"):
            open_clip.model_settings(create_model(name, 50))
    with pytest.raises(UserError, match="between CLIP and SigLIP"):
        huggingface.model_settings(create_model(ModelConfig(name="ViT-nano", logit_bias=-10.0), 50))


def test_a_folder_that_holds_something_is_left_alone(run: Path, tmp_path: Path) -> None:
    """Nothing is overwritten."""
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something already; give a new folder"):
        export(run, "huggingface", tmp_path)


@pytest.mark.parametrize(("kind", "last"), [("huggingface", "config.json"), ("open_clip", "open_clip_config.json")])
def test_an_interrupted_export_is_repeated(run: Path, tmp_path: Path, kind: Any, last: str) -> None:
    """The configuration comes last: without it a folder is a half of one's own, with it nothing is touched."""
    whole = export(run, kind, tmp_path / "whole")["files"]
    assert whole[-1] == last
    half = tmp_path / "half"
    half.mkdir()
    (half / whole[0]).write_bytes(b"torn")
    (half / ".tmp-rest").write_bytes(b"torn")
    export(run, kind, half)
    assert sorted(path.name for path in half.iterdir()) == sorted(whole)
    for name in whole:
        assert (half / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(UserError, match="holds something already; give a new folder"):
        export(run, kind, half)


def test_nothing_is_written_into_a_run_or_under_a_file(run: Path, tmp_path: Path) -> None:
    """The exported one's or another's."""
    other = tmp_path / "other"
    (other / "checkpoints").mkdir(parents=True)
    (other / "config.json").write_text("{}")
    for inside in (run, run / "exported", run / "checkpoints" / "out", other / "a" / "b"):
        before = sorted(run.rglob("*"))
        with pytest.raises(UserError, match=r"lies inside a run, .*; give a new folder elsewhere"):
            export(run, "huggingface", inside)
        assert sorted(run.rglob("*")) == before
    (tmp_path / "file").write_text("mine")
    for under in ("file", "file/x", "file/x/y"):
        with pytest.raises(UserError, match="file is a file; give a new folder") as caught:
            export(run, "huggingface", tmp_path / under)
        assert "\n" not in str(caught.value)
