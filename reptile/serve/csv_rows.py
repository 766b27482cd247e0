"""Rows of a table in CSV, as `reptile prepare` reads them, for the runtime to check."""

import csv
import io
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from starlette.exceptions import HTTPException

from reptile.bundle_format import Column
from reptile.errors import InputError

SEPARATORS = ",;\t|"
MAX_HEADER = 2**20  # characters, as of `reptile prepare`
MISSING = ("", "na", "n/a", "nan", "null", "none")


def read_csv(
    content: bytes, columns: Sequence[Column], label: str | None, most: int
) -> list[dict[str, Any]]:
    """Return rows by the names of their columns; other columns are left out.

    The first line names the columns. The separator is the one of `SEPARATORS` that gives most of
    the names. A number that cannot be read stays text, which the runtime refuses by row and column.

    Args:
        content: UTF-8, with quotation marks as of RFC 4180.
        columns: of inputs and values. Those that the file lacks are left out of the rows.
        label: name of a classifier's column of labels, which may be lacking too; None for none.
        most: rows that are read.

    Raises:
        HTTPException: not CSV in UTF-8.
        InputError: too many rows, a row of another length than the header, or a header that is too
            long or names a column twice.
    """
    try:
        text = content.decode("utf-8-sig")
        lines = io.StringIO(text, newline="")
        kinds = {} if label is None else {label: "category"}
        kinds |= {column.name: column.kind for column in columns}
        header, separator = _header(lines.readline(MAX_HEADER), kinds)
        places = {name: header.index(name) for name in kinds if name in header}
        rows: list[dict[str, Any]] = []
        for cells in _cells(lines, separator, len(header)):
            if len(rows) == most:
                raise InputError(f"more than {most} rows: send fewer in one request")
            rows.append({name: _value(cells[at], kinds[name]) for name, at in places.items()})
    except UnicodeDecodeError:
        raise HTTPException(400, "the CSV is not UTF-8: save the table as UTF-8") from None
    except csv.Error as error:
        raise HTTPException(400, f"the body is not CSV: {error}") from None
    return rows


def _header(line: str, kinds: dict[str, str]) -> tuple[list[str], str]:
    if len(line) == MAX_HEADER:
        raise InputError(f"the header has {MAX_HEADER:,} characters or more: send fewer columns")
    split = {
        separator: [
            _normal(name)
            for cells in csv.reader([line], delimiter=separator, strict=True)
            for name in cells
        ]
        for separator in SEPARATORS
    }
    separator = max(SEPARATORS, key=lambda each: (len({*kinds} & {*split[each]}), len(split[each])))
    header = split[separator]
    if twice := [name for name in kinds if header.count(name) > 1]:
        raise InputError(f"column {twice[0]!r} is there more than once: rename all but one")
    return header, separator


def _cells(lines: Iterable[str], separator: str, count: int) -> Iterator[list[str]]:
    number = 0
    for cells in csv.reader(lines, delimiter=separator, strict=True):
        if not cells:
            continue
        if len(cells) != count:
            raise InputError(
                f"rows: row {number} has {len(cells)} columns, the header {count}: put values that "
                "hold the separator into quotation marks"
            )
        yield cells
        number += 1


def _value(cell: str, kind: str) -> float | str | None:
    text = _normal(cell)
    if text.casefold() in MISSING:
        return None
    if kind == "number":
        try:
            return float(text)
        except ValueError:
            return text
    return text


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text.strip())
