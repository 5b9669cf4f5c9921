"""The image: clean by the linter, built by the commands of `make install`, and with every file it needs."""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "infra/docker/Dockerfile"
PACKAGES = ("infra", "shards", "ingest", "dedup", "train", "pairmill")


def instructions() -> list[tuple[str, str]]:
    """Each instruction of the Dockerfile and the rest of its line, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1].strip()) for line in lines if line.strip()]


def copied() -> list[str]:
    """The paths of the repository that the image takes."""
    found: list[str] = []
    for name, rest in instructions():
        if name == "COPY" and "--from=" not in rest:
            found += shlex.split(rest)[:-1]
    return found


def pip_installs(text: str) -> list[str]:
    """What each `pip install` in `text` is asked for, without the options that only say how loudly."""
    asked = re.findall(r"-m pip install (.*?)(?:&&|$)", text, flags=re.MULTILINE)
    quiet = re.compile(r"--quiet|--disable-pip-version-check|\$\{TORCH_INDEX[^}]*\}")
    return [" ".join(quiet.sub("", arguments).split()) for arguments in asked]


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    checked = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert checked.stdout == ""


def test_the_base_image_is_pinned_and_the_user_is_not_root() -> None:
    bases = [rest for name, rest in instructions() if name == "FROM"]
    assert {base.split()[0] for base in bases} == {"python:3.11-slim-bookworm"}
    users = [rest for name, rest in instructions() if name == "USER"]
    assert users == ["1000:1000"]


def test_the_image_installs_what_make_install_does() -> None:
    runs = "\n".join(rest for name, rest in instructions() if name == "RUN")
    makefile = pip_installs((ROOT / "Makefile").read_text())
    assert pip_installs(runs) == makefile[:2]


def test_the_files_taken_are_enough_to_run(tmp_path: Path) -> None:
    taken = copied()
    assert set(PACKAGES) <= set(taken)
    for name in taken:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, tmp_path / name)
    assert subprocess.run([sys.executable, "-m", "compileall", "-q", *PACKAGES], cwd=tmp_path).returncode == 0
    program = (
        "import sys, pairmill.cli, pairmill.sample_web.archive as archive; "
        "assert archive.__file__.startswith(sys.argv[1]), archive.__file__; "
        "assert archive.select('train')"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", program, str(tmp_path)]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_dockerignore_lets_through_what_the_image_takes() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "**"
    let_through = {line[1:] for line in lines if line.startswith("!")}
    assert let_through == set(copied())
    dropped_again = [line for line in lines[1:] if not line.startswith("!")]
    for pattern in dropped_again:
        assert not any(fnmatch.fnmatch(f"x/{name}", pattern) for name in copied())
