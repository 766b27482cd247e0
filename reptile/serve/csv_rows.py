"""A table in CSV, as `reptile prepare` reads one, for the runtime to check."""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from starlette.exceptions import HTTPException

from reptile.errors import InputError
from reptile.serve.task_store import normal

SEPARATORS = ",;\t|"
MAX_HEADER = 2**20  # characters, as of `reptile prepare`
MISSING = ("", "na", "n/a", "nan", "null", "none")

Value = float | str | None
Table = dict[str, list[Value]]  # a column's values by its name


def read_csv(content: bytes, columns: Mapping[str, str], most: int) -> Table:
    """Return the values of these columns by name; other columns are left out.

    The first line names the columns. The separator is the one of `SEPARATORS` that gives most of
    the names. A number that cannot be read stays text, which the runtime refuses by row and column.

    Args:
        content: UTF-8, with quotation marks as of RFC 4180.
        columns: name and kind (see `Column`); those that the file lacks are left out.
        most: rows that are read.

    Raises:
        HTTPException: not CSV in UTF-8.
        InputError: too many rows, a row of another length than the header, or a header that is too
            long or names a column twice.
    """
    try:
        lines = io.StringIO(content.decode("utf-8-sig"), newline="")
        header, separator = _header(lines.readline(MAX_HEADER), columns)
        table: Table = {name: [] for name in header.places}
        for number, cells in enumerate(_cells(lines, separator, header.size)):
            if number == most:
                raise InputError(f"more than {most} rows: send fewer in one request")
            for name, place in header.places.items():
                table[name].append(_value(cells[place], columns[name]))
    except UnicodeDecodeError:
        raise HTTPException(400, "the CSV is not UTF-8: save the table as UTF-8") from None
    except csv.Error as error:
        raise HTTPException(400, f"the body is not CSV: {error}") from None
    return table


class _Header(NamedTuple):
    size: int  # columns of the file
    places: dict[str, int]  # of the columns that are read
    twice: str | None  # a column to read that is named more than once


def _header(line: str, columns: Mapping[str, str]) -> tuple[_Header, str]:
    if len(line) == MAX_HEADER:
        raise InputError(f"the header has {MAX_HEADER:,} characters or more: send fewer columns")
    split = {separator: _split(line, separator, columns) for separator in SEPARATORS}
    separator = max(SEPARATORS, key=lambda each: (len(split[each].places), split[each].size))
    header = split[separator]
    if header.twice is not None:
        raise InputError(f"column {header.twice!r} is there more than once: rename all but one")
    return header, separator


def _split(line: str, separator: str, columns: Mapping[str, str]) -> _Header:
    names = [
        _normal(name)
        for cells in csv.reader([line], delimiter=separator, strict=True)
        for name in cells
    ]
    places, twice = {}, None
    for place, name in enumerate(names):
        if name in places:
            twice = name
        elif name in columns:
            places[name] = place
    return _Header(len(names), places, twice)


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


def _value(cell: str, kind: str) -> Value:
    text = _normal(cell)
    if text.casefold() in MISSING:
        return None
    if kind == "number" and text.isascii() and "_" not in text:  # Python would read 1_000
        try:
            return float(text)
        except ValueError:
            return text
    return text


def _normal(text: str) -> str:
    return normal(text.strip())
