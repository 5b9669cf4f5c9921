"""Rows of image URLs and captions, read as a stream from files of every usual kind on any filesystem."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from infra.config import nearest
from infra.errors import UserError
from infra.logs import log
from infra.storage import storage_failures
from ingest import tsv
from ingest.characters import LONE_SURROGATE, Replaced

ROWS_PER_BATCH = 16_384
PARQUET_BUFFER_BYTES = 4 * 2**20
CSV_BLOCK_BYTES = 8 * 2**20
FORMATS = {
    ".parquet": "parquet", ".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl",
    ".json": "jsonl", ".txt": "txt",
}  # fmt: skip
RAGGED_TOLD = 5
"""Lines of another number of fields that are told one by one; of the others their number is."""
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_BROKEN = (OSError, EOFError, UnicodeDecodeError, pa.ArrowInvalid)


@dataclass(frozen=True)
class Columns:
    """Which columns are read: the URL's, the caption's (None without captions), and which others are kept."""

    url: str
    caption: str | None
    others: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Source:
    """One file of rows: `format` is a value of `FORMATS`."""

    fs: Any
    path: str
    format: str
    compression: str | None

    def open(self) -> IO[bytes]:
        """Open the file's decompressed bytes. Raises UserError if that cannot be done."""
        try:
            stream: IO[bytes] = self.fs.open(self.path, "rb", compression=self.compression)
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"{self.path}: cannot be read: {error}") from None
        return stream


def find_sources(urls: str) -> list[Source]:
    """Return the files that `urls` names (a file, a folder or a glob, on any fsspec filesystem), by name.

    Raises:
        UserError: nothing there, or files of no known kind.
    """
    if not urls:
        raise UserError("no rows named; give --urls FILE, FOLDER or GLOB")
    try:
        fs, path = fsspec.core.url_to_fs(urls)
    except (ValueError, ImportError, TypeError) as error:
        raise UserError(f"{urls}: this storage cannot be opened: {error}") from None
    try:
        paths = _paths(fs, path, urls)
    except storage_failures() as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{urls}: cannot be reached: {what}; see to its address and to your credentials") from None
    return [_source(fs, name) for name in sorted(paths)]


def _paths(fs: Any, path: str, urls: str) -> list[str]:
    if any(sign in path for sign in "*?["):
        paths = [name for name in fs.glob(path) if not fs.isdir(name)]
        if not paths:
            raise UserError(f"{urls}: no file matches")
    elif fs.isdir(path):
        paths = [name for name in fs.ls(path, detail=False) if _kind(name)]
        if not paths:
            raise UserError(f"{urls}: no file of rows in this folder (known: {', '.join(sorted(FORMATS))})")
    elif fs.exists(path):
        paths = [path]
    else:
        raise UserError(f"{urls}: no such file")
    return paths


def read_rows(sources: Sequence[Source], columns: Columns) -> Iterator[pa.RecordBatch]:
    """Yield the rows of all files in order, as batches with the columns `url`, `caption`, then the others kept.

    Every batch has the schema of the first file's. A row without a URL or a caption has a null there.

    Raises:
        UserError: a file that is empty, unreadable, damaged, or lacks a column (the message lists what it has).
    """
    schema: pa.Schema | None = None
    seen = 0
    for source in sources:
        rows_here = 0
        for batch in _guarded(source, columns):
            table = _arranged(batch, source, columns)
            schema = schema or table.schema
            table = _fitted(table, schema, source)
            rows_here += table.num_rows
            yield from table.to_batches()
        if not rows_here and len(sources) > 1:
            log.warning("%s: holds no rows", source.path)
        seen += rows_here
    if not seen:
        names = sources[0].path if len(sources) == 1 else f"{sources[0].path} and {len(sources) - 1} more"
        raise UserError(f"{names}: empty, there are no rows to plan; give --urls a file that holds some")


def _source(fs: Any, path: str) -> Source:
    kind = _kind(path)
    if kind is None:
        known = ", ".join(sorted(FORMATS))
        raise UserError(f"{path}: unknown kind of file; known are {known}, and these with {', '.join(COMPRESSIONS)}")
    suffix = PurePosixPath(path).suffix.lower()
    return Source(fs, path, kind, "infer" if suffix in COMPRESSIONS else None)


def _kind(path: str) -> str | None:
    suffixes = [suffix.lower() for suffix in PurePosixPath(path).suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None


def _guarded(source: Source, columns: Columns) -> Iterator[pa.Table]:
    """Read one file, turning what its bytes can do wrong into an error that names it."""
    readers = {"parquet": _parquet, "csv": _csv, "tsv": _tsv, "jsonl": _jsonl, "txt": _txt}
    try:
        yield from readers[source.format](source, columns)
    except UserError:
        raise
    except _BROKEN as error:
        what = " ".join(str(error).split()) or type(error).__name__
        mend = "save it as UTF-8" if "utf" in what.lower() else "mend it, or get it anew"
        raise UserError(f"{source.path}: cannot be read as {source.format}: {what}; {mend}") from None


def _parquet(source: Source, columns: Columns) -> Iterator[pa.Table]:
    if not source.fs.size(source.path):
        raise UserError(f"{source.path}: empty, not even a parquet header")
    local = isinstance(source.fs, LocalFileSystem)
    # Buffered by column: read ahead, pyarrow keeps the bytes of every row group until the file is closed.
    with (
        pa.OSFile(source.path) if local else source.open() as stream,
        pq.ParquetFile(stream, pre_buffer=False, buffer_size=PARQUET_BUFFER_BYTES) as file,
    ):
        wanted = _wanted(file.schema_arrow.names, source, columns)
        replaced, row = Replaced(), 0
        for batch in file.iter_batches(ROWS_PER_BATCH, columns=wanted):
            yield replaced.table(pa.Table.from_batches([batch]), source.path, row)
            row += batch.num_rows
        replaced.tell(source.path)


def _csv(source: Source, columns: Columns) -> Iterator[pa.Table]:
    """Every column is read as text: types guessed from the first block would not hold for the last."""
    parsing = pacsv.ParseOptions(newlines_in_values=True)
    reading = pacsv.ReadOptions(block_size=CSV_BLOCK_BYTES)
    with source.open() as stream:
        first = stream.read(1)
    if not first:
        return
    with source.open() as stream, pacsv.open_csv(stream, reading, parsing) as reader:
        names = reader.schema.names
    _no_name_twice(names, source)
    wanted = _wanted(names, source, columns)
    converting = pacsv.ConvertOptions(
        column_types=dict.fromkeys(wanted, pa.string()), include_columns=wanted, strings_can_be_null=False
    )
    with source.open() as stream, pacsv.open_csv(stream, reading, parsing, converting) as reader:
        for batch in reader:
            yield pa.Table.from_batches([batch])


def _no_name_twice(names: list[str], source: Source) -> None:
    if len(set(names)) < len(names):
        raise UserError(f"{source.path}: two columns have the same name: {', '.join(names)}")


def _tsv(source: Source, columns: Columns) -> Iterator[pa.Table]:
    """A line that does not have the header's fields is a row without a URL; the line is its caption."""
    names: list[str] = []
    wanted: list[str] = []
    rows: list[list[str | None]] = []
    ragged = 0
    with source.open() as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="\n") as stream:
        for number, line in enumerate(stream, 1):
            text = line.rstrip("\r\n")
            if not text:
                continue
            if not names:
                names = tsv.fields(text) or []
                _no_name_twice(names, source)
                wanted = _wanted(names, source, columns)
                places = [names.index(name) for name in wanted]
                continue
            found = tsv.fields(text, len(names))
            if found is None:
                ragged += 1
                _tell_ragged(source, number, text, len(names), ragged)
                rows.append([None, text, *(None for _ in wanted[2:])][: len(wanted)])
            else:
                rows.append([found[place] for place in places])
            if len(rows) == ROWS_PER_BATCH:
                yield _text_table(wanted, rows)
                rows = []
    if rows:
        yield _text_table(wanted, rows)
    if ragged > RAGGED_TOLD:
        log.warning("%s: %d lines in all have another number of fields than the header", source.path, ragged)


def _tell_ragged(source: Source, number: int, line: str, width: int, ragged: int) -> None:
    if ragged <= RAGGED_TOLD:
        log.warning(
            "%s: line %d has %d fields, the header %d; it is rejected as bad_url (a line is a row here, "
            "line breaks and tabs inside of values want CSV or parquet)",
            source.path, number, line.count("\t") + 1, width,
        )  # fmt: skip


def _text_table(names: list[str], rows: list[list[str | None]]) -> pa.Table:
    columns = zip(*rows, strict=True)
    return pa.table({name: pa.array(column, pa.string()) for name, column in zip(names, columns, strict=True)})


def _jsonl(source: Source, columns: Columns) -> Iterator[pa.Table]:
    """The first batch of rows decides which columns there are; values that are no text are kept as JSON."""
    names: list[str] | None = None
    wanted: list[str] = []
    replaced = Replaced()
    with source.open() as stream:
        for rows in _json_batches(source, stream):
            if names is None:
                names = list(dict.fromkeys(key for _, row in rows for key in row))
                wanted = _writable(_wanted(names, source, columns), source)
            if columns.others is None:
                _no_new_keys(rows, names, source)
            texts = ([_text(row.get(name), number, replaced) for name in wanted] for number, row in rows)
            yield _text_table(wanted, list(texts))
    replaced.tell(source.path)


def _json_batches(source: Source, stream: IO[bytes]) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    rows: list[tuple[int, dict[str, Any]]] = []
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            mend = "save it as UTF-8" if isinstance(error, UnicodeDecodeError) else "mend that line"
            raise UserError(f"{source.path}: line {number} is not JSON: {error}; {mend}") from None
        if not isinstance(row, dict):
            raise UserError(f"{source.path}: line {number} is not a JSON object; one object a line is read")
        rows.append((number, row))
        if len(rows) == ROWS_PER_BATCH:
            yield rows
            rows = []
    if rows:
        yield rows


def _no_new_keys(rows: list[tuple[int, dict[str, Any]]], names: list[str], source: Source) -> None:
    known = set(names)
    for number, row in rows:
        if not row.keys() <= known:
            new = min(row.keys() - known)
            raise UserError(
                f"{source.path}: line {number} has the key '{new}' that none of the first {ROWS_PER_BATCH} rows has; "
                "name the columns to carry along with --columns"
            )


def _writable(names: list[str], source: Source) -> list[str]:
    for name in names:
        if LONE_SURROGATE.search(name):
            raise UserError(
                f"{source.path}: the key {name!a} holds half a character; rename it, "
                "or name the columns to carry along, without it, with --columns"
            )
    return names


def _text(value: Any, line: int, replaced: Replaced) -> str | None:
    """Return a value as text that can be written."""
    if value is None:
        return None
    return replaced.text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), line)


def _txt(source: Source, columns: Columns) -> Iterator[pa.Table]:
    """One URL a line and no captions."""
    with source.open() as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as stream:
        lines: list[str] = []
        for line in stream:
            if line.strip():
                lines.append(line.strip())
            if len(lines) == ROWS_PER_BATCH:
                yield pa.table({columns.url: pa.array(lines, pa.string())})
                lines = []
        if lines:
            yield pa.table({columns.url: pa.array(lines, pa.string())})


def _wanted(names: Sequence[str], source: Source, columns: Columns) -> list[str]:
    """Return the columns to read, in the file's order after URL and caption. Raises UserError for one it lacks."""
    main = [columns.url] if columns.caption is None else [columns.url, columns.caption]
    for name in [*main, *(columns.others or ())]:
        if name not in names:
            raise UserError(f"{source.path}: no column '{name}'; it has {', '.join(names)}{nearest(name, list(names))}")
    others = names if columns.others is None else columns.others
    return [*main, *(name for name in others if name not in main)]


def _arranged(table: pa.Table, source: Source, columns: Columns) -> pa.Table:
    """Return the table with its first two columns named `url` and `caption`, both text."""
    captions: pa.ChunkedArray | pa.Array
    if columns.caption is None or source.format == "txt":
        captions = pa.array([""] * table.num_rows, pa.string())
    else:
        captions = _as_text(table[columns.caption], columns.caption, source)
    arranged = {"url": _as_text(table[columns.url], columns.url, source), "caption": captions}
    for name in table.column_names:
        if name in (columns.url, columns.caption):
            continue
        if name in arranged:
            raise UserError(f"{source.path}: column '{name}' besides the one read as {name}; rename it")
        arranged[name] = table[name]
    return pa.table(arranged)


def _as_text(column: pa.ChunkedArray, name: str, source: Source) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type) or pa.types.is_null(column.type)):
        raise UserError(f"{source.path}: column '{name}' holds {column.type}, not text")
    return column.cast(pa.string())


def _fitted(table: pa.Table, schema: pa.Schema, source: Source) -> pa.Table:
    if table.schema.equals(schema):
        return table
    if set(table.column_names) != set(schema.names):
        raise UserError(
            f"{source.path}: its columns ({', '.join(table.column_names)}) are not those of the first file "
            f"({', '.join(schema.names)}); name the ones to carry along with --columns"
        )
    try:
        return table.select(schema.names).cast(schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"{source.path}: its columns have other types than the first file's: {error}") from None
