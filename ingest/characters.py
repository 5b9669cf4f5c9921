"""Text that no file could hold: half characters and bytes that are no UTF-8, replaced by U+FFFD and told."""

from __future__ import annotations

import re

import pyarrow as pa

from infra.errors import UserError
from infra.logs import log

LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class Replaced:
    """How many values of a file had to be changed, and where the first of them is: `line 3`, `row 7`."""

    def __init__(self) -> None:
        self.values = 0
        self.first = ""

    def text(self, text: str, line: int) -> str:
        """Return a text with U+FFFD for each lone surrogate, which JSON can name."""
        if text.isascii() or not LONE_SURROGATE.search(text):
            return text
        self._count(1, f"line {line}")
        return LONE_SURROGATE.sub("\ufffd", text)

    def table(self, table: pa.Table, path: str, first_row: int) -> pa.Table:
        """Return a table of a parquet file with U+FFFD for what is no UTF-8 in its columns of text.

        Raises:
            UserError: a column of another type holds what cannot be.
        """
        for place, name in enumerate(table.column_names):
            column = table.column(place)
            try:
                column.validate(full=True)
            except pa.ArrowInvalid as error:
                if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
                    raise UserError(
                        f"{path}: column '{name}' holds what cannot be ({' '.join(str(error).split())}); save it as "
                        "UTF-8, or name the columns to carry along, without it, with --columns"
                    ) from None
                table = table.set_column(place, name, self._utf8(column, name, first_row))
        return table

    def tell(self, path: str) -> None:
        """Say in the log what was changed, if anything was."""
        if self.values:
            log.warning(
                "%s: %d values hold half a character or bytes that are no UTF-8 (the first in %s); U+FFFD stands there "
                "now", path, self.values, self.first,
            )  # fmt: skip

    def _utf8(self, column: pa.ChunkedArray, name: str, first_row: int) -> pa.Array:
        kind = pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()
        texts: list[str | None] = []
        for row, value in enumerate(column.cast(kind).to_pylist(), first_row):
            text = None if value is None else value.decode("utf-8", "replace")
            if text is not None and text.encode() != value:
                self._count(1, f"row {row}, column '{name}'")
            texts.append(text)
        return pa.array(texts, column.type)

    def _count(self, values: int, where: str) -> None:
        self.values, self.first = self.values + values, self.first or where
