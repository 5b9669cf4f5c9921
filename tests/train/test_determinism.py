"""The same bits each time, where that is asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from infra.errors import UserError
from train import checkpoint
from train.config import RunConfig
from train.determinism import CUBLAS, deterministic
from train.launch import prepare
from train.worker import run_rank

MakeConfig = Callable[..., RunConfig]


class Watched(threading.Event):
    """Notes at every step, when it is asked, whether only deterministic operations are let through."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def is_set(self) -> bool:
        """Take note."""
        self.seen.append(torch.are_deterministic_algorithms_enabled())
        return False


@pytest.mark.parametrize("wanted", [False, True])
def test_a_rank_computes_as_the_run_says(tmp_path: Path, make_config: MakeConfig, wanted: bool) -> None:
    """Steps, and afterwards as before; all of a run is computed so, and twice the same."""
    config = make_config(length="3 steps", parallel={"deterministic": wanted})
    found = []
    threads = torch.get_num_threads()
    for name in ("one", "other"):
        prepare(config, tmp_path / name, 1)
        stop = Watched()
        run_rank(config, tmp_path / name, stop)
        assert stop.seen == [wanted] * 3
        assert not torch.are_deterministic_algorithms_enabled()
        found.append(checkpoint.load_newest(tmp_path / name / "checkpoints", ["model", "optimizer"]))
    torch.set_num_threads(threads)
    one, other = found
    assert one is not None
    assert other is not None
    for table in ("model", "optimizer"):
        assert all(torch.equal(value, other[table][name]) for name, value in one[table].items())


def test_an_operation_that_cannot_is_refused() -> None:
    """Inside alone."""
    places, values = torch.zeros(2, dtype=torch.int64), torch.ones(2)
    torch.zeros(3).put_(places, values)
    with deterministic(True), pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"):
        torch.zeros(3).put_(places, values)
    torch.zeros(3).put_(places, values)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no accelerator")
def test_an_environment_against_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CUBLAS, ":0:0")
    with pytest.raises(UserError, match=rf"{CUBLAS}: ':0:0' lets results differ"), deterministic(True):
        pass
