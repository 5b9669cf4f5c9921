"""The command line: every command parses its options, calls one function and prints its result.

Results go to standard output (as JSON with `--json`), progress and logs to standard error. Exit codes: 0
done, 1 failed while running, 2 the user's mistake.
"""

from __future__ import annotations

import json as jsonlib
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter
from pydantic import ValidationError

from dedup.config import DedupConfig
from infra import logs
from infra.cluster import ClusterConfig
from infra.errors import RunError, UserError
from infra.storage import storage_failures
from ingest.config import IngestConfig, PlanConfig
from pairmill import pipeline, show
from shards.repack import RepackConfig

app = App(
    name="pairmill",
    help="From (image URL, caption) rows to a trained CLIP model, and its zero-shot accuracy.",
    help_format="markdown",
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,  # it would end the process without a word
)

Json = Annotated[bool, Parameter(name="--json", negative=(), help="print the result as JSON on standard output")]
File = Annotated[
    Path | None,
    Parameter(name="--config", help="TOML file of the corpus; options given here are laid over its table"),
]
Flat = Parameter(name="*")


@app.command
def quickstart(
    *,
    out: Annotated[Path, Parameter(help="folder for corpus, run, report.html and result.json")] = Path(
        "quickstart-out"
    ),
    corpus: Annotated[
        str | None,
        Parameter(help="folder or URL for the corpus, for example s3://bucket/corpus; OUT/corpus by default"),
    ] = None,
    web: Annotated[
        list[str] | None,
        Parameter(help="base URLs of a sample web that runs already; by default one is started", negative=()),
    ] = None,
    port: Annotated[int | None, Parameter(help="port of that sample web; 18080 by default, 0 for any")] = None,
    recipe: Annotated[
        Path | None, Parameter(help="TOML file of the training run; the quickstart's own by default")
    ] = None,
    cluster: ClusterConfig = ClusterConfig(),
    json: Json = False,
) -> None:
    """The whole job on the sample web: corpus, training, zero-shot accuracy, report."""
    from pairmill.quickstart import quickstart as run_quickstart

    result = run_quickstart(out, corpus=corpus, web=web, port=port, recipe=recipe, cluster=cluster)
    emit(result, json, show.quickstart)


@app.command
def plan(
    corpus: Annotated[str, Parameter(help="folder or URL of the corpus")],
    *,
    config: File = None,
    options: Annotated[PlanConfig, Flat] = PlanConfig(),
    json: Json = False,
) -> None:
    """Turn rows (parquet, csv, tsv, jsonl, txt) into plan parts, one a shard."""
    settings = pipeline.stage_config(config, "plan", options)
    emit(pipeline.plan(corpus, settings), json, show.stage)


@app.command
def ingest(
    corpus: Annotated[str, Parameter(help="folder or URL of the corpus")],
    *,
    config: File = None,
    options: Annotated[IngestConfig, Flat] = IngestConfig(),
    retry_failed: Annotated[
        bool, Parameter(negative=(), help="then try the rows again that failed and may do better, into new shards")
    ] = False,
    cluster: ClusterConfig = ClusterConfig(),
    json: Json = False,
) -> None:
    """Download, filter and resize the plan's rows into raw shards, on Ray."""
    settings = pipeline.stage_config(config, "ingest", options)
    where = pipeline.stage_config(config, "cluster", cluster)
    emit(pipeline.ingest(corpus, settings, where, retry_failed=retry_failed), json, show.stage)


@app.command
def dedup(
    corpus: Annotated[str, Parameter(help="folder or URL of the corpus")],
    *,
    config: File = None,
    options: Annotated[DedupConfig, Flat] = DedupConfig(),
    report_only: Annotated[
        bool,
        Parameter(negative=(), help="write nothing; say what the corpus has in common with --decontaminate.suites"),
    ] = False,
    anew: Annotated[
        bool,
        Parameter(negative=(), help="make its list again, with other options than it was made with; before `repack`"),
    ] = False,
    cluster: ClusterConfig = ClusterConfig(),
    json: Json = False,
) -> None:
    """Find who is a duplicate of whom, and who shows a test picture; nothing is deleted."""
    settings = pipeline.stage_config(config, "dedup", options)
    where = pipeline.stage_config(config, "cluster", cluster)
    if report_only and anew:
        raise UserError("--report-only writes nothing; leave --anew out")
    if report_only:
        emit(pipeline.overlap(corpus, settings, where), json, show.overlap)
    else:
        emit(pipeline.dedup(corpus, settings, where, anew=anew), json, show.stage)


@app.command
def repack(
    corpus: Annotated[str, Parameter(help="folder or URL of the corpus")],
    *,
    config: File = None,
    options: Annotated[RepackConfig, Flat] = RepackConfig(),
    cluster: ClusterConfig = ClusterConfig(),
    json: Json = False,
) -> None:
    """Write the kept samples into even final shards, with their index."""
    settings = pipeline.stage_config(config, "repack", options)
    emit(pipeline.repack(corpus, settings, pipeline.stage_config(config, "cluster", cluster)), json, show.stage)


@app.command
def remove(
    corpus: Annotated[str, Parameter(help="folder or URL of the corpus")],
    *,
    list: Annotated[
        str, Parameter(help="file or URL of what is to go: lines such as `url URL`, `host HOST`, `pdq HASH DISTANCE`")
    ],
    reason: Annotated[str, Parameter(help="why, for the tombstone")] = "",
    dry_run: Annotated[bool, Parameter(negative=(), help="change nothing; list what would go, and from where")] = False,
    cluster: ClusterConfig = ClusterConfig(),
    json: Json = False,
) -> None:
    """Take samples out of every stage's folder, for good; positions of the others stay."""
    emit(pipeline.remove(corpus, list, cluster, reason=reason, dry_run=dry_run), json, show.removal)


@app.command
def verify(
    folder: Annotated[str, Parameter(help="folder or URL with shards: raw, final, or any webdataset tars")],
    *,
    quick: Annotated[bool, Parameter(negative=(), help="check sizes and the index alone")] = False,
    repair: Annotated[
        bool,
        Parameter(negative=(), help="drop torn shards, for their stage to make again, and build the index anew"),
    ] = False,
    json: Json = False,
) -> None:
    """Read every byte of a shard folder and check it against sidecars, index and digests."""
    report = pipeline.verify(folder, quick=quick, repair=repair)
    emit(report, json, show.verify)
    if report["faults"]:
        raise SystemExit(1)


@app.command
def index(
    folder: Annotated[str, Parameter(help="folder or URL with shards: any webdataset tars")],
    *,
    digests: Annotated[bool, Parameter(negative=(), help="read every byte, for the tars' SHA-256")] = False,
    json: Json = False,
) -> None:
    """Find the samples of a shard folder once and write its index, so that no start has to."""
    emit(pipeline.index(folder, digests=digests), json, show.mapping)


@app.command
def status(
    corpus: Annotated[str, Parameter(help="folder or URL of the corpus")],
    *,
    watch: Annotated[bool, Parameter(negative=(), help="show it anew every two seconds until Ctrl-C")] = False,
    json: Json = False,
) -> None:
    """Shards done, rate, bytes, failures by reason and by host, time left."""
    from pairmill import status as corpus_status

    if watch:
        corpus_status.watch(corpus)
    else:
        emit(corpus_status.status(corpus), json, corpus_status.render)


@app.command
def report(
    corpus: Annotated[str, Parameter(help="folder or URL of the corpus")],
    *,
    run: Annotated[str | None, Parameter(help="folder of a training run")] = None,
    out: Annotated[Path, Parameter(help="file to write")] = Path("report.html"),
    json: Json = False,
) -> None:
    """Write one self-contained HTML file about a corpus and a run."""
    from pairmill.report import build

    emit({"report": build(corpus, run, str(out))}, json, show.mapping)


@app.command
def run(
    toml: Annotated[Path, Parameter(help="TOML file of the corpus")],
    *,
    cluster: ClusterConfig = ClusterConfig(),
    json: Json = False,
) -> None:
    """plan, ingest, dedup, repack and verify in order, skipping what is done."""
    emit(pipeline.run(toml, cluster), json, show.stages)


@app.command
def train(
    toml: Annotated[Path, Parameter(help="TOML file of the run")],
    *,
    run: Annotated[
        str | None, Parameter(help="folder of the run; beside the TOML file, by its name, by default")
    ] = None,
    nproc: Annotated[int | None, Parameter(help="processes to start; 1 by default, torchrun's own under it")] = None,
    launcher: Annotated[
        Literal["local", "ray"], Parameter(help="where they start: on this machine, or on a Ray cluster")
    ] = "local",
    max_failures: Annotated[
        int, Parameter(help="with ray: restarts from the last checkpoint after lost workers and nodes; -1: any number")
    ] = 3,
    min_nproc: Annotated[
        int | None, Parameter(help="with ray: fewest processes to go on with after the loss of nodes; NPROC by default")
    ] = None,
    settings: Annotated[
        list[str] | None,
        Parameter(name="--set", negative=(), help="KEY=VALUE, such as optim.learning_rate=1e-4, over the file's"),
    ] = None,
    changed_config: Annotated[
        bool,
        Parameter(negative=(), help="go on under another learning rate, decay, beta or epsilon than the run's"),
    ] = False,
    cluster: ClusterConfig = ClusterConfig(),
    json: Json = False,
) -> None:
    """Train; goes on from the newest checkpoint of the run. Also under `torchrun -m pairmill.cli train`."""
    from infra.config import assigned, load_toml
    from train.config import RunConfig
    from train.launch import Launcher, leads, on_this_machine
    from train.launch import train as run_training

    start: Launcher = on_this_machine
    if launcher == "ray":
        from train.ray_launch import RayLauncher

        start = RayLauncher(cluster, max_failures, min_nproc or 0)
    config = assigned(load_toml(toml, RunConfig), settings or (), source="--set")
    result = run_training(
        config, run or toml.with_suffix(""), 1 if nproc is None else nproc, start, may_change=changed_config
    )
    if leads():
        emit(result, json, show.mapping)


@app.command(name="eval")
def evaluate(
    checkpoint: Annotated[str, Parameter(help="run folder, or one checkpoint of it")],
    *,
    suite: Annotated[
        list[str],
        Parameter(help="folder in CLIP_benchmark's webdataset layout; may be repeated", negative=()),
    ],
    json: Json = False,
) -> None:
    """Zero-shot classification and retrieval on suites of images."""
    emit([pipeline.evaluate(checkpoint, one) for one in suite], json, show.evaluations)


@app.command
def export(
    checkpoint: Annotated[str, Parameter(help="run folder, or one checkpoint of it")],
    *,
    format: Annotated[
        Literal["open_clip", "huggingface"],
        Parameter(help="open_clip: a folder for `local-dir:`; huggingface: one for `CLIPModel.from_pretrained`"),
    ],
    out: Annotated[str, Parameter(help="new folder or URL for weights, configuration and tokenizer")],
    json: Json = False,
) -> None:
    """Write a trained model as open_clip or Hugging Face load it."""
    from train.export import export as run_export

    emit(run_export(checkpoint, format, out), json, show.mapping)


@app.command
def embed(
    checkpoint: Annotated[str, Parameter(help="run folder, or one checkpoint of it")],
    folder: Annotated[
        str,
        Parameter(
            help="folder or URL: raw/ or final/ of a corpus, webdataset tars, an evaluation suite, picture files"
        ),
    ],
    *,
    out: Annotated[str, Parameter(help="folder or URL for the embeddings, one parquet file a shard")],
    threads: Annotated[int, Parameter(help="threads that decode pictures")] = 8,
    json: Json = False,
) -> None:
    """Write the image embeddings of every sample, for `dedup`; goes on where it stopped."""
    from train.embed import embed as run_embed

    emit(run_embed(checkpoint, folder, out, threads=threads), json, show.mapping)


def emit(result: Any, as_json: bool, render: Any) -> None:
    """Print `result` on standard output: as JSON, or as `render` shows it to a person."""
    if as_json:
        print(jsonlib.dumps(result, indent=2, ensure_ascii=False, default=str))
    else:
        render(result)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and end the process with its exit code."""
    logs.setup()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app(arguments, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        leave(2, _option_error(error))
    except UserError as error:
        leave(2, str(error))
    except RunError as error:
        leave(1, str(error))
    except OSError as error:
        if error.filename is None:
            raise
        leave(1, f"{error.filename}: {error.strerror}; mend that and run the same command again")
    except storage_failures() as error:
        leave(1, f"the storage failed: {type(error).__name__}: {error}; the same command goes on once it is there")
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one has nothing more to stop
        leave(1, "interrupted; run the same command again to go on from here")


def leave(code: int, message: str) -> None:
    """Print one line on standard error and end the process."""
    print(f"pairmill: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _option_error(error: CycloptsError) -> str:
    cause = error.__cause__ or error.__context__
    if isinstance(cause, ValidationError):
        first = cause.errors()[0]
        if not first["loc"]:  # of options that do not go together
            return f"options: {first['msg'].removeprefix('Value error, ')}"
        name = ".".join(str(part) for part in first["loc"]).replace("_", "-")
        return f"option --{name}: {first['msg']} (got {first['input']!r})"
    return f"{str(error).strip()} (see --help)"


if __name__ == "__main__":
    main()
