"""Files of embeddings: read by key, and what is wrong with one named by file and key."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dedup import embeddings
from dedup.embeddings import check, load
from infra.errors import UserError
from tests.mounts import needs_mount

KEYS = np.array(["000000000", "000000002", "000010000", "1000000000"])


def write(path: Path, keys: Any, vectors: Any, kind: Any = None, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [list(one) if one is not None else None for one in vectors]
    kind = kind or pa.list_(pa.float32(), len(rows[0]))
    pq.write_table(pa.table({"key": keys, "embedding": pa.array(rows, kind), **columns}), path)
    return path


def test_embeddings_are_matched_by_key_over_files_and_brought_to_length_1(tmp_path: Path) -> None:
    write(tmp_path / "00000.parquet", ["000000002", "000000001"], [[3, 4], [9, 9]])
    write(tmp_path / "00001.parquet", ["1000000000", "000010000"], [[0, 2], [-1, 0]], pa.list_(pa.float16()))
    found = load(str(tmp_path), KEYS)
    assert found.has.tolist() == [False, True, True, True]
    assert np.allclose(found.vectors, [[0, 0], [0.6, 0.8], [-1, 0], [0, 1]], atol=1e-3)
    cosines = found.cosines(np.array([1, 1, 0]), np.array([2, 3, 1]))
    assert np.allclose(cosines, [-0.6, 0.8, np.nan], atol=1e-3, equal_nan=True)


def test_a_single_file_and_the_raw_key_of_a_final_sample(tmp_path: Path) -> None:
    file = write(tmp_path / "all.parquet", ["000000000", "000000001"], [[1, 0], [0, 1]],
                 source_key=["000010000", "000000002"])  # fmt: skip
    found = load(str(file), KEYS)
    assert found.has.tolist() == [False, True, True, False]
    assert found.vectors[2].tolist() == [1, 0]


LOADED = """
import json, resource, sys
import numpy as np
from dedup import embeddings
from dedup.embeddings import check, load
from infra.errors import NoSpaceError, UserError

folder, scratch, samples, spare_bytes = sys.argv[1], sys.argv[2] or None, int(sys.argv[3]), int(sys.argv[4])
keys = np.array([f"{number:09d}" for number in range(samples)])
load(folder, keys[:1])
now = 1024 * int(open("/proc/self/status").read().split("VmData:")[1].split()[0])
resource.setrlimit(resource.RLIMIT_DATA, (now + spare_bytes,) * 2)
try:
    found = load(folder, keys, scratch=scratch)
except (MemoryError, NoSpaceError, UserError) as error:
    sys.exit(f"{type(error).__name__}: {error}")
print(json.dumps(found.cosines(np.arange(5), np.arange(5) + 7).tolist()))
"""


def loaded(folder: Path, scratch: Path | None, spare_bytes: int, prefix: tuple[str, ...] = ()) -> tuple[str, str]:
    """Load 20,000 embeddings in a process with so much memory of its own to spare; its output and last words."""
    command = (*prefix, sys.executable, "-c", LOADED, str(folder), str(scratch or ""), "20000", str(spare_bytes))
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.stdout, run.stderr


@pytest.fixture(scope="module")
def of_40_mb(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """20,000 vectors of 1,000 numbers, in files of 1,000."""
    folder = tmp_path_factory.mktemp("embeddings")
    drawn = np.random.default_rng(0).standard_normal((20_000, 1000), np.float32)
    keys = [f"{number:09d}" for number in range(20_000)]
    for start in range(0, 20_000, 1000):
        column = pa.FixedSizeListArray.from_arrays(pa.array(drawn[start : start + 1000].ravel()), 1000)
        pq.write_table(
            pa.table({"key": keys[start : start + 1000], "embedding": column}), folder / f"{start:05d}.parquet"
        )
    return folder, drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def test_a_scratch_folder_holds_them_instead_of_memory(tmp_path: Path, of_40_mb: tuple[Path, Any]) -> None:
    folder, unit = of_40_mb
    output, words = loaded(folder, tmp_path, spare_bytes=36 * 2**20)
    assert output, words
    assert np.allclose(json.loads(output), (unit[:5] * unit[7:12]).sum(axis=1), atol=1e-3)
    assert not list(tmp_path.iterdir())
    output, words = loaded(folder, None, spare_bytes=36 * 2**20)
    assert not output
    assert "MemoryError" in words


@needs_mount
def test_a_scratch_folder_without_room(tmp_path: Path, of_40_mb: tuple[Path, Any]) -> None:
    mount = f'mount -t tmpfs -o size=200k tmpfs {tmp_path} && "$@"'
    _, words = loaded(of_40_mb[0], tmp_path, 2**30, prefix=("unshare", "-rm", "sh", "-c", mount, "sh"))
    assert words.strip() == f"NoSpaceError: {tmp_path}: no room for 40000000 bytes of embeddings; name another folder"


def test_a_scratch_folder_that_is_not_there(tmp_path: Path) -> None:
    file = str(write(tmp_path / "all.parquet", ["000000000"], [[1.0, 0.0]]))
    with pytest.raises(UserError, match=r"semantic\.scratch: .*nowhere: No such file or directory; name a folder"):
        load(file, KEYS, scratch=str(tmp_path / "nowhere"))


def test_samples_without_an_embedding_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write(tmp_path / "all.parquet", ["000000000"], [[1.0, 0.0]])
    with caplog.at_level(logging.WARNING):
        load(str(file), KEYS)
    assert "3 of 4 samples have no embedding" in caplog.text


@pytest.mark.parametrize(
    ("keys", "vectors", "message"),
    [
        (["000000000", "000000002"], [[1, 0], [float("nan"), 0]], "of 000000002 is not finite"),
        (["000000000", "000000002"], [[1, 0], [float("inf"), 0]], "of 000000002 is not finite"),
        (["000000000", "000000002"], [[0, 0], [1, 0]], "of 000000000 is zero"),
        (["000000000", "000000002"], [[1, 0], None], "of 000000002 is null"),
        (["000000002", "000000002"], [[1, 0], [1, 0]], "a second embedding of 000000002"),
        (["000000009", "000000008"], [[1, 0], [1, 0]], "no embedding of any of the 4 samples"),
    ],
)
def test_bad_embeddings_are_named(tmp_path: Path, keys: Any, vectors: Any, message: str) -> None:
    file = write(tmp_path / "bad.parquet", keys, vectors)
    with pytest.raises(UserError, match=message) as told:
        load(str(file), KEYS)
    assert "bad.parquet" in str(told.value)
    assert "\n" not in str(told.value)


def test_keys_that_are_no_text_are_named(tmp_path: Path) -> None:
    file = write(tmp_path / "numbers.parquet", [0, 2], [[1, 0], [0, 1]])
    for look in (lambda: check(str(file)), lambda: load(str(file), KEYS)):
        with pytest.raises(UserError, match=r"numbers.parquet: the column 'key' is int64; keys are text"):
            look()


def test_files_without_a_row_hold_no_embedding(tmp_path: Path) -> None:
    file = write(tmp_path / "none.parquet", pa.array([], pa.string()), [], pa.list_(pa.float32(), 2))
    with pytest.raises(UserError, match="no embedding of any of the 4 samples"):
        load(str(file), KEYS)
    assert not len(load(str(file), KEYS[:0]).vectors)


def test_a_file_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "all.parquet", KEYS.tolist(), [[1, 0], [0, 1], [0, 2], [3, 0]])
    whole = load(str(file), KEYS).vectors
    monkeypatch.setattr(embeddings, "_READ_AT_ONCE", 3)
    np.testing.assert_array_equal(load(str(file), KEYS).vectors, whole)
    twice = write(tmp_path / "twice.parquet", [*KEYS.tolist(), KEYS[0]], [[1, 0], [0, 1], [0, 2], [3, 0], [1, 1]])
    with pytest.raises(UserError, match="a second embedding of 000000000"):
        load(str(twice), KEYS)


def test_another_dimension_names_both_files(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", ["000000000"], [[1, 0]])
    write(tmp_path / "b.parquet", ["000000002"], [[1, 0, 0]])
    with pytest.raises(UserError, match=r"b.parquet: embeddings of 3 numbers, .*a.parquet has 2"):
        load(str(tmp_path), KEYS)
    ragged = write(
        tmp_path / "c" / "c.parquet", ["000000000", "000000002"], [[1, 0], [1, 0, 0]], pa.list_(pa.float32())
    )
    with pytest.raises(UserError, match="of 000000002 is null or not of 2 numbers"):
        load(str(ragged), KEYS)


def test_what_is_no_file_of_embeddings_is_said(tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": ["000000000"]}), tmp_path / "keys.parquet")
    with pytest.raises(UserError, match="no column 'embedding'"):
        load(str(tmp_path / "keys.parquet"), KEYS)
    pq.write_table(pa.table({"key": ["000000000"], "embedding": ["text"]}), tmp_path / "text.parquet")
    with pytest.raises(UserError, match="is string"):
        load(str(tmp_path / "text.parquet"), KEYS)
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(UserError, match=r"torn.parquet: no sound parquet"):
        load(str(tmp_path / "torn.parquet"), KEYS)
    for path in ("none", "none.parquet"):
        with pytest.raises(UserError, match="pairmill embed"):
            load(str(tmp_path / path), KEYS)


def test_an_empty_corpus_has_none(tmp_path: Path) -> None:
    file = write(tmp_path / "all.parquet", ["000000000"], [[1, 0]])
    assert load(str(file), KEYS[:0]).vectors.shape == (0, 2)
