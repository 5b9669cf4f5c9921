"""A tar of a million tiny members: found, indexed, verified and read in little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shards.tar import END, header

SAMPLES = 500_000
MOST_GROWTH_BYTES = 320 * 2**20
SCRIPT = """
import json, resource, sys
from infra.storage import Folder
from shards import index, stream, verify

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = peak()
folder = Folder(sys.argv[1])
built = index.build(folder)
index.save(folder, built)
scanned = peak()
report = verify.verify(folder)
verified = peak()
first = next(iter(stream.ShardStream(folder, global_batch_size=64)))
print(json.dumps({
    "samples": built.samples, "verified": report.samples, "faults": len(report.faults), "batch": len(first),
    "scan_growth": scanned - before, "verify_growth": verified - before,
}))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_million_members(tmp_path: Path) -> None:
    with (tmp_path / "00000.tar").open("wb") as out:
        for row in range(SAMPLES):
            out.write(header(f"{row:09d}.jpg", 1) + b"i" + bytes(511) + header(f"{row:09d}.txt", 0))
        out.write(END)
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": root},
    )  # fmt: skip
    (tmp_path / "00000.tar").unlink()  # three quarters of a GiB, and pytest keeps folders
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["samples"], found["verified"], found["faults"], found["batch"]) == (SAMPLES, SAMPLES, 0, 64)
    assert found["scan_growth"] < MOST_GROWTH_BYTES / 4, found
    assert found["verify_growth"] < MOST_GROWTH_BYTES, found
