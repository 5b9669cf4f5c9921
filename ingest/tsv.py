"""A line of a TSV file and its fields: quoted as spreadsheets do it, or word for word."""

from __future__ import annotations

import csv


def fields(line: str, width: int | None = None) -> list[str] | None:
    """Return the fields of a line, without its end; None when there is no way to see `width` of them in it.

    A line whose quotes open and close is read as CSV is, so that `"5"" nails"` is `5" nails`. In any other the
    quotes are text, as in lists like CC3M's that quote nothing. A line is a row in either case: were a field to
    run on over its end, one stray quote would take the rows that follow with it.
    """
    plain = line.split("\t")
    quoted = _quoted(line) if '"' in line else None
    for found in (quoted, plain):
        if found is not None and width in (None, len(found)):
            return found
    return None


def _quoted(line: str) -> list[str] | None:
    try:
        (found,) = csv.reader([line], delimiter="\t", strict=True)
    except (csv.Error, ValueError):  # a quote that does not close, or a carriage return that ends a row
        return None
    return found
