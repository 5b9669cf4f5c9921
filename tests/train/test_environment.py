"""A rank's environment: what is missing or no number is named in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from infra.errors import UserError
from train.config import RunConfig
from train.environment import told
from train.launch import leads, train

NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
WHOLE = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Sets these variables, and none of the others."""

    def become(variables: dict[str, str]) -> None:
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return become


def test_what_a_launcher_says_is_taken(environment: Callable[[dict[str, str]], None]) -> None:
    """And without one there is nothing."""
    environment(WHOLE)
    assert told() == (1, 2)
    assert not leads()
    environment({"WORLD_SIZE": "1", "RANK": "0"})
    assert told() == (0, 1)
    assert leads()
    environment({"RANK": "7"})
    assert told() is None
    assert leads()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RANK", None, "RANK: not set, where WORLD_SIZE is 2"),
        ("RANK", "2", "RANK: '2' is no whole number from 0 to 1"),
        ("RANK", "-1", "RANK: '-1' is no whole number"),
        ("RANK", "one", "RANK: 'one' is no whole number"),
        ("RANK", "", "RANK: '' is no whole number"),
        ("RANK", "\u0661", "is no whole number"),
        ("WORLD_SIZE", "0", "WORLD_SIZE: '0' is no whole number"),
        ("WORLD_SIZE", "2.0", "WORLD_SIZE: '2.0' is no whole number"),
        ("WORLD_SIZE", "9" * 5000, "is no whole number"),
        ("LOCAL_WORLD_SIZE", "0", "LOCAL_WORLD_SIZE: '0' is no whole number"),
        ("LOCAL_RANK", "x", "LOCAL_RANK: 'x' is no whole number"),
        ("MASTER_PORT", None, "MASTER_PORT: not set"),
        ("MASTER_PORT", "70000", "MASTER_PORT: '70000' is no whole number"),
        ("MASTER_ADDR", None, "MASTER_ADDR: not set"),
    ],
)
def test_what_is_missing_or_no_number_is_named(
    tmp_path: Path,
    make_config: Callable[..., RunConfig],
    environment: Callable[[dict[str, str]], None],
    name: str,
    value: str | None,
    message: str,
) -> None:
    """Before anything is written."""
    others = {other: known for other, known in WHOLE.items() if other != name}
    environment(others if value is None else others | {name: value})
    with pytest.raises(UserError) as caught:
        train(make_config(), tmp_path / "run", 1)
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()
