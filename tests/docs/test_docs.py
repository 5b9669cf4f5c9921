"""The pages say what the code does: links, commands, options, configuration files, names of the format."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.config import Config, load_toml
from pairmill.cli import app
from pairmill.pipeline import CorpusConfig
from shards import index
from shards.layout import SIDECAR, Reason, Status
from shards.writer import ShardWriter
from train.config import RunConfig

ROOT = Path(__file__).parents[2]
FLOORS = ("infra", "shards", "ingest", "dedup", "train", "pairmill")
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *(page for floor in FLOORS for page in ROOT.glob(f"{floor}/**/*.md"))]
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")
SPAN = re.compile(r"`([^`\n]+)`")
WHOLE_FILES: dict[str, type[Config]] = {"# corpus.toml": CorpusConfig, "# run.toml": RunConfig}
GLOBAL_OPTIONS = {"--help", "--version"}

per_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def fences(page: Path, *languages: str) -> list[str]:
    """Return the fenced blocks of a page that are in one of these languages."""
    return [text for language, text in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Return the anchors that a page's headings make, by GitHub's rule."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the arguments of every `pairmill` command of a page, in blocks and in running text."""
    blocks = "\n".join(fences(page, "", "sh", "bash", "console")).replace("\\\n", " ")
    spans = [span for span in SPAN.findall(prose(page)) if span.startswith("pairmill ")]
    for line in [*blocks.splitlines(), *spans]:
        if "pairmill" not in line:
            continue
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue  # a drawing, not a command
        for place, word in enumerate(words[:-1]):
            called = word.rpartition("/")[2] == "pairmill" and "://" not in word
            if (called or word == "pairmill.cli") and (place == 0 or not words[place - 1].startswith("http")):
                yield words[place + 1 :]


def options_of(command: str) -> set[str]:
    """Return every option that a command takes."""
    return {name for argument in app[command].assemble_argument_collection() for name in argument.names}


def leaves(model: type[Config], above: str = "") -> Iterator[tuple[str, str]]:
    """Yield (table, key) of every option of a configuration."""
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Config):
            yield from leaves(inner, f"{above}.{name}".strip("."))
        else:
            yield above, name


def test_there_are_pages() -> None:
    """The patterns above find what they are meant to."""
    assert len(PAGES) >= 10
    assert len([one for page in PAGES for one in commands(page)]) >= 20
    assert sum(block.startswith(tuple(WHOLE_FILES)) for page in PAGES for block in fences(page, "toml")) >= 2


@per_page
def test_relative_links_resolve(page: Path) -> None:
    """A link names a file that is there, and a heading that it has."""
    broken = []
    for link in LINK.findall(prose(page)):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@per_page
def test_commands_and_options_exist(page: Path) -> None:
    """Every command line of a page is one that the program takes, as far as names go."""
    known = {name for name in app if not name.startswith("-")}
    for words in commands(page):
        command, rest = words[0], words[1:]
        if command.startswith("-"):
            assert command in GLOBAL_OPTIONS, words
            continue
        assert command in known, f"pairmill {' '.join(words)}"
        given = {word.partition("=")[0].strip("[]") for word in rest if word.strip("[]").startswith("--")}
        unknown = given - options_of(command) - GLOBAL_OPTIONS
        assert not unknown, f"pairmill {' '.join(words)}: {unknown}"


@per_page
def test_options_named_in_the_text_exist(page: Path) -> None:
    """An option named on its own is one of ours: with a dot in it, it cannot be another program's."""
    every = {option for command in app if not command.startswith("-") for option in options_of(command)}
    named = {span.split()[0].partition("=")[0] for span in SPAN.findall(prose(page)) if span.startswith("--")}
    assert not {option for option in named if "." in option} - every


@per_page
def test_whole_configuration_files_load(page: Path, tmp_path: Path) -> None:
    """A TOML block that is a corpus' or a run's file loads."""
    for number, block in enumerate(fences(page, "toml")):
        model = WHOLE_FILES.get(block.splitlines()[0].strip())
        if model is not None:
            file = tmp_path / f"{number}.toml"
            file.write_text(block, encoding="utf-8")
            load_toml(file, model)


def test_format_names_every_status_reason_and_column() -> None:
    """The format's page has a row for each, and the addresses of a sample under the index' own names."""
    page = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    rows = [set(SPAN.findall(line.split(" | ")[0])) for line in page.splitlines() if line.startswith("| `")]
    first_cells = set().union(*rows)
    names = {str(one) for one in [*Status, *Reason] if one} | set(SIDECAR.names) | set(index.SCHEMA.names)
    assert not names - first_cells


def test_format_names_every_key_of_a_commit(tmp_path: Path) -> None:
    """The keys of `_stats.json` are those that the writer puts there."""
    page = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    with (tmp_path / "tar").open("wb") as tar:
        keys = set(ShardWriter("00000", tar, SIDECAR).stats())
    assert not {key for key in keys if f"`{key}`" not in page}


def test_data_engineers_page_names_every_reason() -> None:
    """The table of a crawl's outcomes is complete; what dedup finds is no outcome of a crawl."""
    page = (ROOT / "docs" / "data-engineer.md").read_text(encoding="utf-8")
    duplicates = {one for one in Reason if one.startswith("duplicate_")} - {Reason.DUPLICATE_URL}
    found_later = duplicates | {Reason.TEST_IMAGE}
    wanted = [one for one in Reason if one and one not in found_later]
    assert not [one for one in wanted if f"`{one}`" not in page]


def test_ml_engineers_page_names_every_option_of_a_run() -> None:
    """Every table and key of RUN.toml is described."""
    page = (ROOT / "docs" / "ml-engineer.md").read_text(encoding="utf-8")
    missing = [
        f"{table}.{key}"
        for table, key in leaves(RunConfig)
        if f"`{key}`" not in page and f"`{table}.{key}`" not in page
    ]
    assert not missing
    assert not {table for table, _ in leaves(RunConfig) if table and f"`[{table}]`" not in page}


@pytest.mark.parametrize("floor", FLOORS)
def test_architecture_names_every_file(floor: str) -> None:
    """The list of rooms is that of the house."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = page.partition(f"### {floor}:")[2].partition("\n### ")[0]
    files = [path.name for path in (ROOT / floor).glob("*.py") if path.name != "__init__.py"]
    assert not [name for name in files if f"`{name}`" not in section]
