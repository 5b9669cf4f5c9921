"""The main job on the sample web, one command: corpus, training, zero-shot accuracy, report, result.json."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from infra.cluster import ClusterConfig
from infra.config import load_toml, override
from infra.errors import RunError, UserError
from infra.lock import exclusive
from infra.logs import log
from infra.memory import PeakMemory
from infra.storage import Folder
from pairmill import pipeline
from pairmill.sample_web import archive
from pairmill.sample_web.process import SampleWeb, SampleWebError, free_port, loopback_hosts
from pairmill.sample_web.rows import write_rows
from shards.layout import FINAL

PORT = 18_080
"""A fixed port, so that the URLs, and with them the corpus, are the same on every machine and every run."""
RECIPE = Path(__file__).parent / "quickstart.toml"
TRAINING_RECIPE = Path(__file__).parent.parent / "train" / "recipes" / "quickstart.toml"
MARK, ROWS = "quickstart.json", "web/urls.parquet"
TRAINING_PROCESSES = 2
PROMPTS = ("{c}", "{c} emoji", "{c} icon", "Picture of {c}")
"""Prompt templates: `{c}` stands for a name. Features of a name's prompts are averaged."""


def quickstart(
    out: Path,
    *,
    corpus: str | None = None,
    web: Sequence[str] | None = None,
    port: int | None = None,
    recipe: Path | None = None,
    cluster: ClusterConfig | None = None,
) -> dict[str, Any]:
    """Run every stage that is not done yet and return what `result.json` holds.

    Args:
        out: local folder for the corpus, the run, `report.html` and `result.json`.
        corpus: folder or URL for the corpus instead of `OUT/corpus`.
        web: base URLs of a sample web that runs already, instead of one started here.
        port: port of the sample web that is started here, `PORT` by default, 0 for any that is free.
        recipe: TOML file of the training run, the quickstart's own by default.
        cluster: where the data stages run; a local Ray by default.

    Raises:
        UserError: `out` holds something else, or the sample web's port is taken.
        RunError: a stage failed, or rows were lost on the way.
    """
    if port is not None and not 0 <= port < 2**16:
        raise UserError(f"--port {port}: a port is 0 (any that is free) to {2**16 - 1}")
    folder = Folder(out)
    corpus = corpus or (folder / "corpus").url
    _check_is_ours(folder)
    with exclusive(folder):
        clock = _Clock(folder)
        with PeakMemory() as memory:
            serving = _serving(web, _port(clock, port, begun=folder.exists(ROWS)))
            stages = _build_corpus(folder, corpus, serving, cluster or ClusterConfig(), clock)
            training, evaluations = _train_and_measure(folder, corpus, recipe or TRAINING_RECIPE, clock)
        with clock.measure("report"):
            from pairmill.report import build

            measured = {"seconds": clock.seconds, "peak_memory_bytes": memory.peak_bytes}
            report = build(corpus, (folder / "run").url, str(out / "report.html"), measured)
        result = _result(stages, training, evaluations, clock.seconds)
        result |= {"peak_memory_bytes": memory.peak_bytes, "report": report}
        folder.write_json("result.json", result)
    return result


def _port(clock: _Clock, given: int | None, *, begun: bool) -> int:
    if given == 0:
        given = None if begun else free_port()
    return clock.same("port", given, PORT, begun=begun)


class _Clock:
    """Seconds spent in each stage, kept over interruptions beside what must stay the same over them."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._kept: dict[str, Any] = folder.read_json(MARK) if folder.exists(MARK) else {"seconds": {}}
        self.seconds: dict[str, float] = self._kept["seconds"]
        self._save()

    def same(self, name: str, given: int | None, default: int, *, begun: bool) -> int:
        """Return the value `name` has here: what it was when this began, else what is given or the default.

        Raises:
            UserError: another one is given now, and what was made with the first is `begun`.
        """
        kept = self._kept.get(name) if begun else None
        if kept is not None and given not in (None, kept):
            raise UserError(f"{self._folder.url}: was begun with {name} {kept}; use that, or another folder with --out")
        value: int = next(one for one in (kept, given, default) if one is not None)
        self._kept[name] = value
        self._save()
        return value

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the block's duration to `stage`."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.monotonic() - started, 2)
            self._save()

    def _save(self) -> None:
        self._folder.write_json(MARK, self._kept)


def _check_is_ours(folder: Folder) -> None:
    if folder.exists(MARK) or not [name for name in folder.names() + folder.folders() if not name.startswith(".")]:
        return
    raise UserError(f"{folder.url}: holds something other than a quickstart; name an empty or a new folder")


def _build_corpus(
    folder: Folder,
    corpus: str,
    serving: AbstractContextManager[Sequence[str]],
    cluster: ClusterConfig,
    clock: _Clock,
) -> list[dict[str, Any]]:
    rows = folder / "web"
    with ExitStack() as open_web:
        with clock.measure("sample_web"):
            base_urls = open_web.enter_context(serving)
            if not folder.exists(ROWS):
                write_rows(Path(rows.url), base_urls)
        config = load_toml(RECIPE, pipeline.CorpusConfig)
        plan = config.plan.model_copy(update={"urls": folder.path(ROWS)})
        cluster = override(config.cluster, cluster)
        config = config.model_copy(update={"corpus": corpus, "plan": plan, "cluster": cluster})
        return pipeline.build(config, measure=clock.measure)


@contextmanager
def _serving(web: Sequence[str] | None, port: int) -> Iterator[Sequence[str]]:
    if web:
        yield web
        return
    server = SampleWeb(hosts=loopback_hosts(), port=port)
    try:
        server.start()
    except SampleWebError as error:
        raise UserError(str(error)) from None
    try:
        log.info("sample web: %d hosts on port %d", len(server.base_urls), port)
        yield server.base_urls
    finally:
        server.stop()


def _train_and_measure(
    folder: Folder, corpus: str, recipe: Path, clock: _Clock
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    from train.config import RunConfig
    from train.launch import train

    suites = write_suites(folder)
    config = load_toml(recipe, RunConfig)
    config = config.model_copy(
        update={
            "data": config.data.model_copy(update={"folder": (Folder(corpus) / FINAL).url}),
            "evaluate": config.evaluate.model_copy(update={"suite": suites["held_out_style"]}),
        }
    )
    run = folder / "run"
    with clock.measure("train"):
        training = train(config, run.url, TRAINING_PROCESSES)
    with clock.measure("evaluate"):
        evaluations = {name: pipeline.evaluate(run.url, suite) for name, suite in suites.items()}
    return training, evaluations


def write_suites(folder: Folder) -> dict[str, str]:
    """Write the two hold-outs as evaluation suites below `folder`; return their paths by name."""
    from train.evaluate.suite import write_suite

    suites: dict[str, str] = {}
    for hold_out in archive.hold_outs():
        suite = folder / "suites" / hold_out.name
        suites[hold_out.name] = suite.url
        if suite.exists("classnames.txt"):
            continue
        samples = [
            {"key": f"{number:05d}", "png": image, "cls": target, "txt": hold_out.names[target]}
            for number, (image, target) in enumerate(zip(hold_out.images, hold_out.targets, strict=True))
        ]
        write_suite(suite.url, samples, hold_out.names, PROMPTS)
    return suites


def _result(
    stages: list[dict[str, Any]],
    training: dict[str, Any],
    evaluations: dict[str, dict[str, Any]],
    seconds: dict[str, float],
) -> dict[str, Any]:
    plan, ingest = stages[0], stages[1]
    by_status = dict(ingest["by_status"])
    by_status["filtered"] = by_status.get("filtered", 0) + plan["rows_in"] - plan["rows_out"]
    if sum(by_status.values()) != plan["rows_in"]:
        raise RunError(f"{plan['rows_in']} rows came in and {sum(by_status.values())} are accounted for")
    measured = {
        name: {field: result[field] for field in ("names", "top1", "top5")} for name, result in evaluations.items()
    }
    return {
        "rows_in": plan["rows_in"],
        "rows_by_status": by_status,
        **measured,
        "retrieval": {name: result["retrieval"] for name, result in evaluations.items()},
        "training": training,
        "seconds": seconds,
        "stages": [{name: value for name, value in stage.items() if name != "by_host"} for stage in stages],
    }
