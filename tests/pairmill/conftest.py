"""The command line as a user meets it: real processes, on a corpus made by it from a running sample web."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pairmill.sample_web.process import SampleWeb, loopback_hosts
from pairmill.sample_web.rows import write_rows

PATIENCE_S = 120.0
MARK = "PAIRMILL_TEST_MARK"
COMMAND = [sys.executable, "-m", "pairmill.cli"]
CORPUS = """
corpus = "{corpus}"
[plan]
urls = "{urls}"
rows_per_shard = 10
[ingest]
workers = 2
shards_at_once = 1
[ingest.image]
size = 32
[ingest.fetch]
allow_private = true
per_host_per_s = 0
[repack]
samples_per_shard = 20
[cluster]
cpus = 2
object_store_bytes = 83886080
"""
RUN = """
length = "{length}"
[data]
folder = "{folder}"
global_batch_size = 16
image_size = 16
[tokenizer]
vocabulary = 320
[model]
embed_dim = 16
vision = {{ widths = [4, 8], depths = [1, 1], statistics_group = 8 }}
text = {{ context = 12, width = 16, layers = 1, heads = 2 }}
[optim]
warmup = "2 steps"
[parallel]
precision = "float32"
threads = 1
[checkpoint]
every = "4 steps"
[log]
every = "1 steps"
"""


class Begun:
    """A command at work, in a process group of its own as a shell makes one; whatever it starts carries a mark."""

    def __init__(self, *arguments: str | Path) -> None:
        self.mark = secrets.token_hex(8)
        self.process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            env={**os.environ, MARK: self.mark}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip

    def wait_until(self, holds: Callable[[], object]) -> None:
        """Wait until something holds while the command is at work."""
        end = time.monotonic() + PATIENCE_S
        while not holds():
            assert self.process.poll() is None, self.process.stderr and self.process.stderr.read()
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.02)

    def has_locked(self, folder: Path) -> None:
        """Wait until the command holds the lock of a folder."""
        self.wait_until(lambda: (folder / ".lock").exists() and str(self.process.pid) in (folder / ".lock").read_text())

    def interrupt(self) -> str:
        """Press Ctrl-C, which a terminal tells the whole group; return all the command had to say."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.communicate(timeout=PATIENCE_S)[1]

    def kill(self) -> None:
        """Kill -9 the command alone; what it had started is to end by itself."""
        self.process.kill()
        self.process.wait()
        self.leaves_nothing()

    def leaves_nothing(self) -> None:
        """Wait until all that the command had started is gone."""
        end = time.monotonic() + PATIENCE_S
        while left := self.family():
            assert time.monotonic() < end, left
            time.sleep(0.1)

    def family(self) -> list[psutil.Process]:
        """Return the processes that carry the mark and live."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found


@pytest.fixture
def begin() -> Iterator[Callable[..., Begun]]:
    """Start a command and go on; at the end of the test it and all it started are killed."""
    begun: list[Begun] = []

    def start(*arguments: str | Path) -> Begun:
        begun.append(Begun(*arguments))
        return begun[-1]

    yield start
    for one in begun:
        for process in one.family():
            process.kill()
        one.process.wait()
        assert one.process.stderr is not None
        one.process.stderr.close()


@pytest.fixture(scope="session")
def pairmill() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command to its end; `prefix` is put before it."""

    def run(*arguments: str | Path, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        command = [*prefix, *COMMAND, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)

    return run


@pytest.fixture
def mistake(pairmill: Callable[..., subprocess.CompletedProcess[str]]) -> Callable[..., str]:
    """Run a command that is the user's mistake; return all it says, which is one line."""

    def run(*arguments: str | Path) -> str:
        done = pairmill(*arguments)
        assert done.returncode == 2, done.stderr
        assert done.stdout == ""
        assert done.stderr.startswith("pairmill: ")
        assert done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    return run


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, pairmill: Callable[..., subprocess.CompletedProcess[str]]) -> Path:
    """A folder with `corpus/`, all stages done, and `corpus.toml`; made once, and copied by `finished`."""
    folder = tmp_path_factory.mktemp("made")
    with SampleWeb(loopback_hosts(2)) as web:
        kinds = ["not_found", "redirect", "cmyk", "noai"]
        rows = write_rows(folder / "rows", web.base_urls, limit=80, share=0.3, kinds=kinds)
        toml = folder / "corpus.toml"
        toml.write_text(CORPUS.format(corpus=folder / "corpus", urls=rows.urls))
        done = pairmill("run", toml)
        assert done.returncode == 0, done.stderr
        yield folder


@pytest.fixture
def finished(made: Path, tmp_path: Path) -> Path:
    """A corpus of one's own with every stage done; `corpus.toml` beside it describes it, `slow.toml` a slow ingest."""
    toml = (made / "corpus.toml").read_text().replace(str(made / "corpus"), str(tmp_path / "corpus"))
    (tmp_path / "corpus.toml").write_text(toml)
    (tmp_path / "slow.toml").write_text(toml.replace("per_host_per_s = 0", "per_host_per_s = 5"))
    return shutil.copytree(made / "corpus", tmp_path / "corpus")


@pytest.fixture
def undo() -> Callable[..., None]:
    """Take stages of a corpus back."""

    def take_back(corpus: Path, *stages: str) -> None:
        content = json.loads((corpus / "corpus.json").read_text())
        for stage in stages:
            shutil.rmtree(corpus / stage)
            del content["stages"][stage]
        (corpus / "corpus.json").write_text(json.dumps(content))

    return take_back


@pytest.fixture
def recipe(tmp_path: Path, made: Path) -> Callable[..., Path]:
    """Write the TOML file of a small training run; its folder is beside it, `run`."""

    def write(length: str = "12 steps", more: str = "") -> Path:
        path = tmp_path / "run.toml"
        path.write_text(RUN.format(length=length, folder=made / "corpus" / "final") + more)
        return path

    return write
