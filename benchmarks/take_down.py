"""Take-down of 1,000 scattered samples from 1,000 shards: what it touches, what it costs, and an interruption half way.

A corpus of 1,000 raw and 1,000 final shards of tiny pictures; the list names one sample of each raw shard. Measured
beside it, in the same run: copying the bytes of the same files with fsync and rename, which is the least that replacing
them whole takes. A second corpus, a copy, has the same command killed half way and given again.

    python benchmarks/take_down.py [--shards 1000] [--samples-a-shard 20]
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
from tiny_shards import tiny_shards

from dedup.config import DedupConfig
from dedup.signature import SignatureWriter
from infra.config import Config
from infra.storage import Folder
from shards import index
from shards.layout import DEDUP, FINAL, FORMAT_VERSION, PLAN, RAW, SIGNATURES, SOURCE_KEY, sample_key, shard_name
from shards.manifest import Manifest
from shards.verify import verify

STAGES = (RAW, f"{DEDUP}/{SIGNATURES}", FINAL)
COMMAND = [sys.executable, "-m", "pairmill.cli", "remove"]
ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Build, remove, interrupt, compare, and print one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--samples-a-shard", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        built = _corpus(folder / "corpus", options.shards, options.samples_a_shard)
        listed = folder / "list.txt"
        rng = random.Random(0)
        keys = [sample_key(shard, rng.randrange(options.samples_a_shard)) for shard in range(options.shards)]
        listed.write_text("".join(f"key {key}\n" for key in keys))
        shutil.copytree(built, folder / "killed")
        result = _measured(built, listed, folder) | _interrupted(folder / "killed", built, listed)
    print(json.dumps({"benchmark": "take_down", "samples": len(keys), "shards": options.shards, **result}, indent=2))


def _corpus(path: Path, shards: int, samples_a_shard: int) -> Path:
    """Build a corpus whose final shards are its raw ones: what matters here is how many and how large they are."""
    folder = Folder(path)
    tiny_shards(path / RAW, shards, samples_a_shard)
    (path / RAW / "index.parquet").unlink()
    _final(folder, shards)
    folder.write_json("corpus.json", {"format": FORMAT_VERSION, "stages": {}})
    manifest = Manifest.existing(folder)
    rows = shards * samples_a_shard
    totals: dict[str, Any] = {"rows_in": rows, "by_status": {"success": rows}, "by_reason": {}, "shards": shards}
    more: dict[str, dict[str, int]] = {DEDUP: {"kept": rows, "removed": 0}, FINAL: {"samples": rows}}
    for stage, config in ((PLAN, Config()), (RAW, Config()), (DEDUP, DedupConfig()), (FINAL, Config())):
        manifest.begin(stage, config)
        manifest.finish(stage, totals | more.get(stage, {}))
    writer = SignatureWriter(folder.url)
    for shard in range(shards):
        writer.run(shard_name(shard))
    return path


def _final(folder: Folder, shards: int) -> None:
    """Copy the raw shards to `final/`, with the column that says so in their sidecars."""
    raw, final = folder / RAW, folder / FINAL
    Path(final.url).mkdir(parents=True)
    for number in range(shards):
        name = shard_name(number)
        shutil.copy(raw.path(f"{name}.tar"), final.path(f"{name}.tar"))
        table = pq.read_table(raw.path(f"{name}.parquet"))
        buffer = io.BytesIO()
        pq.write_table(table.append_column(SOURCE_KEY, table["key"]), buffer, compression="zstd")
        Path(final.path(f"{name}.parquet")).write_bytes(buffer.getvalue())
        digest = hashlib.sha256(buffer.getvalue()).hexdigest()
        stats = raw.read_json(f"{name}_stats.json")
        stats |= {"sidecar_bytes": len(buffer.getvalue()), "sidecar_sha256": digest}
        Path(final.path(f"{name}_stats.json")).write_text(json.dumps(stats))
    index.save(final, index.build(final))


def _measured(corpus: Path, listed: Path, folder: Path) -> dict[str, Any]:
    before = _digests(corpus)
    wall_s, cpu_s, told = _run(corpus, listed)
    after = _digests(corpus)
    changed = sorted(name for name in before if after[name] != before[name])
    by_stage = {stage: sum(name.startswith(f"{stage}/") for name in changed) for stage in STAGES}
    shards = told["shards"][RAW] + told["shards"][FINAL]
    copy_wall_s, copy_cpu_s, copied = _copied([corpus / name for name in changed], folder / "copies")
    return {
        "removed": told["samples"],
        "files_changed": by_stage,
        "files_not_concerned_changed": len(set(changed) - {"corpus.json"}) - sum(by_stage.values()),
        "faults_after": sum(len(verify(str(corpus / stage)).faults) for stage in (RAW, FINAL)),
        "seconds": round(wall_s, 2),
        "cpu_ms_a_shard": round(1000 * cpu_s / shards, 2),
        "wall_ms_a_shard": round(1000 * wall_s / shards, 2),
        "copy_of_the_same_files": {
            "bytes": copied,
            "seconds": round(copy_wall_s, 2),
            "cpu_ms_a_shard": round(1000 * copy_cpu_s / shards, 2),
        },
        "seconds_to_the_copy": round(wall_s / copy_wall_s, 2),
    }


def _interrupted(corpus: Path, whole: Path, listed: Path) -> dict[str, Any]:
    """Kill the command when half of the raw shards are done, give it again, and compare with the one not killed."""
    half = sum(1 for _ in (corpus / RAW).glob("*_stats.json")) // 2
    started = time.time()
    process = subprocess.Popen(
        [*COMMAND, str(corpus), "--list", str(listed)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    done = 0
    while process.poll() is None and done < half:
        time.sleep(0.3)
        done = sum(path.stat().st_mtime > started for path in (corpus / RAW).glob("*_stats.json"))
    if process.poll() is None:
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            one.send_signal(signal.SIGKILL)
    process.wait()
    _run(corpus, listed)
    return {
        "killed_after_raw_shards": done,
        "killed": process.returncode == -signal.SIGKILL,
        "same_bytes_after_the_repeat": _digests(corpus) == _digests(whole),
    }


def _run(corpus: Path, listed: Path) -> tuple[float, float, dict[str, Any]]:
    """Run the command; return seconds of wall and of CPU, its workers' too, and what it printed."""
    before, started = os.times(), time.monotonic()
    process = psutil.Popen(
        [*COMMAND, str(corpus), "--list", str(listed), "--json"], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    seen: dict[int, float] = {}
    output, _ = _followed(process, seen)
    wall_s, after = time.monotonic() - started, os.times()
    own = after.children_user + after.children_system - before.children_user - before.children_system
    return wall_s, max(own, sum(seen.values())), json.loads(output)


def _followed(process: Any, seen: dict[int, float]) -> tuple[bytes, bytes]:
    """Wait for a process to end; note what each process of its tree has used, for its workers are nobody's children."""
    while True:
        try:
            return process.communicate(timeout=0.2)  # type: ignore[no-any-return]
        except subprocess.TimeoutExpired:
            for one in [process, *process.children(recursive=True)]:
                try:
                    times = one.cpu_times()
                except psutil.Error:
                    continue
                seen[one.pid] = times.user + times.system


def _copied(paths: list[Path], folder: Path) -> tuple[float, float, int]:
    """Copy files one by one, each with fsync and a rename; return seconds of wall and of CPU, and bytes."""
    folder.mkdir()
    before, started, size = time.process_time(), time.monotonic(), 0
    for number, path in enumerate(paths):
        data = path.read_bytes()
        temporary = folder / f".{number}"
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(folder / str(number))
        size += len(data)
    return time.monotonic() - started, time.process_time() - before, size


def _digests(corpus: Path) -> dict[str, str]:
    paths = [path for path in corpus.rglob("*") if path.is_file() and path.name != ".lock"]
    return {
        str(path.relative_to(corpus)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
        if path.parent.name != "tombstones"
    }


if __name__ == "__main__":
    main()
