"""Files of embeddings: read by key, and what is wrong with one named by file and key."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dedup.embeddings import load
from infra.errors import UserError

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
