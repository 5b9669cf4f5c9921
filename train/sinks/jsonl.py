"""RUN/log.jsonl: one JSON object a log line, continued without a gap or an overlap after an interruption."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infra.storage import Folder, full_disk_is_named

LOG_NAME = "log.jsonl"


class JsonLines:
    """Appends lines to `log.jsonl`.

    Args:
        run: the run's folder.
        step: lines of later steps are taken out.
    """

    def __init__(self, run: Path, step: int) -> None:
        self.path = run / LOG_NAME
        cut(run, LOG_NAME, step)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line."""
        with full_disk_is_named(str(self.path)), self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def close(self) -> None:
        """Do nothing: every line is in the file."""


def cut(run: Path, name: str, step: int) -> None:
    """Take the lines of steps after `step` out of a file, which is there afterwards."""
    kept = [line for line in lines(run / name) if line["step"] <= step]
    Folder(run).write(name, "".join(json.dumps(line) + "\n" for line in kept).encode())


def lines(path: Path) -> list[dict[str, Any]]:
    """Return a log's lines; one that a killed process left unfinished is dropped."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found
