"""RUN/log.jsonl: one JSON object a log line, continued without a gap or an overlap after an interruption."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infra.errors import UserError
from infra.storage import Folder, full_disk_is_named

LOG_NAME = "log.jsonl"
TAIL_BYTES = 8192
"""Longer than any line."""


class JsonLines:
    """Appends lines to `log.jsonl`.

    Args:
        run: the run's folder.
        step: lines of later steps are taken out.

    Raises:
        UserError: the log that is there holds something else.
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
    """Return a log's lines; a last one that a killed process left unfinished is dropped.

    Raises:
        UserError: another line is no JSON object with a `step`.
    """
    if not path.exists():
        return []
    found = []
    texts = path.read_bytes().split(b"\n")
    for number, text in enumerate(texts, start=1):
        line = parsed(text)
        if "step" in line:
            found.append(line)
        elif number < len(texts):
            raise UserError(f"{path}: line {number} is no JSON object with a whole `step`; take it out or mend it")
    return found


def last_line(path: Path) -> dict[str, Any]:
    """Return a log's last whole line; nothing if there is none."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - TAIL_BYTES))
            whole = stream.read().split(b"\n")[:-1]
    except OSError:
        return {}
    return parsed(whole[-1]) if whole else {}


def parsed(text: bytes) -> dict[str, Any]:
    """Return the log line of a text, or nothing if it is none: a JSON object whose `step` is a whole number."""
    try:
        line = json.loads(text)
    except ValueError:
        return {}
    is_line = isinstance(line, dict) and type(line.get("step")) is int
    return line if is_line else {}
