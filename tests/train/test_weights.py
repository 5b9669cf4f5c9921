"""Published weights: every form a file comes in, and what is refused."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from infra.errors import UserError
from train.config import RunConfig
from train.evaluate.run import load_model
from train.launch import prepare, train
from train.loop import fit, resumed
from train.model import create_model
from train.state import build
from train.weights import load_published

State = dict[str, Tensor]
MakeConfig = Callable[..., RunConfig]


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


def torn(path: Path) -> None:
    """A safetensors file whose header is no JSON."""
    save_file({"a": torch.zeros(2)}, path)
    path.write_bytes(path.read_bytes().replace(b'{"a"', b'{"a|', 1))


def of_an_unknown_type(path: Path) -> None:
    """A safetensors file of a type that nobody has."""
    save_file({"a": torch.zeros(2)}, path)
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F99"', 1))


DAMAGED = "not read, since it holds more than tensors or is damaged"
WRITERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickle.pt": (lambda path: path.write_bytes(pickle.dumps({"weights": Path("anything")})), DAMAGED),
    "script.pt": (lambda path: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path), DAMAGED),
    "torn.pt": (lambda path: path.write_bytes(b"PK\x03\x04 torn"), DAMAGED),
    "empty.pt": (lambda path: path.write_bytes(b""), DAMAGED),
    "text.pt": (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), DAMAGED),
    "module.pt": (lambda path: torch.save(torch.nn.Linear(2, 2), path), DAMAGED),
    "torn.safetensors": (torn, "no sound safetensors file"),
    "short.safetensors": (lambda path: path.write_bytes(b"torn"), "no sound safetensors file"),
    "empty.safetensors": (lambda path: path.write_bytes(b""), "no sound safetensors file"),
    "type.safetensors": (of_an_unknown_type, "no sound safetensors file"),
    "list.pt": (lambda path: torch.save([torch.zeros(2)], path), "holds no state dict, but list"),
    "tensor.pt": (lambda path: torch.save(torch.zeros(2), path), "holds no state dict, but Tensor"),
    "number.pt": (lambda path: torch.save(7, path), "holds no state dict, but int"),
    "nothing.pt": (lambda path: torch.save({}, path), "holds no tensors"),
    "keys.pt": (lambda path: torch.save({3: torch.zeros(2)}, path), "holds no state dict: 3 is int, and no name"),
    "values.pt": (lambda path: torch.save({"epoch": 3}, path), "holds no state dict: epoch is int, and no tensor"),
    "inner.pt": (
        lambda path: torch.save({"state_dict": [1]}, path),
        "no state dict: state_dict is list, and no tensor",
    ),
    "sparse.pt": (lambda path: torch.save({"a": torch.eye(2).to_sparse()}, path), "a is no plain tensor"),
    "complex.pt": (lambda path: torch.save({"a": torch.zeros(2, dtype=torch.cfloat)}, path), "a is no plain tensor"),
    "meta.pt": (lambda path: torch.save({"a": torch.zeros(2, device="meta")}, path), "a is no plain tensor"),
    "twice.pt": (lambda path: torch.save({"a": torch.ones(1), "module.a": torch.ones(1)}, path), "holds a twice"),
    "none.pt": (lambda path: None, "no such file of weights"),
    "folder.pt": (lambda path: path.mkdir(), "no such file of weights"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_holds_more_than_tensors_is_not_read(tmp_path: Path, name: str) -> None:
    """Whatever else a file holds, one line names it."""
    write, message = WRITERS[name]
    write(tmp_path / name)
    with pytest.raises(UserError) as caught:
        load_published(create_model("ViT-nano", 50), tmp_path / name)
    assert f"{name}: " in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


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


def test_a_run_that_goes_on_does_not_ask_for_them(tmp_path: Path, make_config: MakeConfig) -> None:
    """The file has gone since; with no checkpoint to go on from it is missed."""
    model = {"name": "RN10-tiny", "weights": str(tmp_path / "a.pt")}
    config = make_config(length="2 steps", model=model, tokenizer={"kind": "clip"}, checkpoint={"every": "1 steps"})
    torch.save(create_model("RN10-tiny").state_dict(), tmp_path / "a.pt")
    run = tmp_path / "run"
    prepare(config, run, 1)
    state = build(config, run)
    fit(state, run, lambda: state.step == 1)
    (tmp_path / "a.pt").unlink()
    assert resumed(build(config, run), run).step == 1
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match=r"a\.pt: no such file of weights"):
        build(config, run)
