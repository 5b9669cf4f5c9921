"""Published weights: every form a file comes in, and what is refused."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from infra.errors import UserError
from train.config import RunConfig
from train.evaluate.run import load_model
from train.launch import train
from train.model import create_model
from train.weights import load_published

State = dict[str, Tensor]


def as_openai(state: State, path: Path) -> None:
    """Half precision, with three numbers beside the weights."""
    numbers = {"input_resolution": 32, "context_length": 16, "vocab_size": 50}
    extras = {name: torch.tensor(value) for name, value in numbers.items()}
    torch.save(
        {name: value.half() if value.is_floating_point() else value for name, value in state.items()} | extras, path
    )


def as_open_clips_trainer(state: State, path: Path) -> None:
    """A checkpoint under data parallelism."""
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}, path)


@pytest.mark.parametrize(
    ("write", "name"),
    [(as_openai, "a.pt"), (as_open_clips_trainer, "a.pt"), (torch.save, "a.bin"), (save_file, "a.safetensors")],
)
@pytest.mark.parametrize("model_name", ["ViT-nano", "RN-nano"])
def test_weights_load(tmp_path: Path, write: Callable[[State, Path], None], name: str, model_name: str) -> None:
    """All of them, in float32."""
    source, target = create_model(model_name, 50), create_model(model_name, 50)
    write(source.state_dict(), tmp_path / name)
    load_published(target, tmp_path / name)
    exact = write is not as_openai
    for key, value in target.state_dict().items():
        wanted = source.state_dict()[key]
        assert value.dtype == wanted.dtype
        assert torch.equal(value, wanted if exact else wanted.half().to(wanted.dtype)), key


def test_another_models_weights_name_tensors(tmp_path: Path) -> None:
    """Of another width."""
    torch.save(create_model("ViT-nano", 60).state_dict(), tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a.pt: a checkpoint of another model: token_embedding.weight is \[60, 32\]"):
        load_published(create_model("ViT-nano", 50), tmp_path / "a.pt")


def test_what_holds_more_than_tensors_is_not_read(tmp_path: Path) -> None:
    """A pickle, a TorchScript archive, a list, a damaged file, none at all."""
    model = create_model("ViT-nano", 50)
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"weights": Path("anything")}))
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    (tmp_path / "damaged.pt").write_bytes(b"PK\x03\x04 torn")
    (tmp_path / "damaged.safetensors").write_bytes(b"torn")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    for name, message in (
        ("pickle.pt", "not read, since it holds more than tensors or is damaged"),
        ("script.pt", "not read, since it holds more than tensors or is damaged"),
        ("damaged.pt", "not read, since it holds more than tensors or is damaged"),
        ("damaged.safetensors", "no sound safetensors file"),
        ("list.pt", "holds no state dict, but list"),
        ("none.pt", "no such file of weights"),
    ):
        with pytest.raises(UserError, match=f"{name}: {message}"):
            load_published(model, tmp_path / name)


def test_a_run_begins_with_given_weights(tmp_path: Path, make_config: Callable[..., RunConfig]) -> None:
    """Those of the file, but for one step that is next to nothing."""
    model = {"name": "RN10-tiny", "weights": str(tmp_path / "a.pt")}
    config = make_config(
        length="1 steps",
        model=model,
        tokenizer={"kind": "clip"},
        optim={"learning_rate": 1e-12, "weight_decay": 0, "ema": 0},
    )
    given = create_model("RN10-tiny")
    torch.save(given.state_dict(), tmp_path / "a.pt")
    train(config, tmp_path / "run", 1)
    trained = load_model(tmp_path / "run")[0]
    for name, value in trained.named_parameters():
        torch.testing.assert_close(value, given.get_parameter(name), rtol=0, atol=1e-9)
