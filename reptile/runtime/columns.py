"""Rows of a table as the numbers that a bundle's graphs take: names of categories, dates, gaps.

The graphs do the rest: they scale, and replace what is missing. Bundles of other inputs: `inputs`.
"""

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from reptile.bundle_format import Column
from reptile.errors import InputError

Rows = npt.NDArray[np.float64]
Inputs = npt.ArrayLike | Mapping[str, npt.ArrayLike] | Sequence[Mapping[str, Any]]
"""Images or numbers; or rows of a table: columns by name, or a mapping for each row."""


def check_rows(rows: Any, columns: Sequence[Column], what: str) -> Rows:
    """Return rows as float64 [N, columns].

    Args:
        rows: a mapping or a data frame of columns by name, of N values each (others are ignored); a
            list of N mappings by name; a list of N rows, each with a value for every column (or the
            value, of a single column); or an array [N, columns] of numbers, [N] of a single column,
            in which alone a category is its place in the manifest's list.
        columns: of the bundle's inputs, or of its values.
        what: their name in error messages.

    A number is any real number; a date a datetime (UTC where it has no zone), date, datetime64, ISO
    8601 text, or seconds since 1970; a category its name, and one that is not in the list counts as
    `other`. None and NaN are missing: the graph takes the training data's mean, or `other`.

    Raises:
        InputError: a missing column, columns of different lengths, or a value that cannot be used.
    """
    names = [column.name for column in columns]
    if isinstance(rows, Mapping) or hasattr(rows, "columns"):
        known = list(getattr(rows, "columns", rows))
        missing = [name for name in names if name not in known]
        if missing:
            raise InputError(f"{what}: no column {missing[0]!r}: give {_joined(names)}")
        values: Sequence[Sequence[Any]] = [_listed(rows[name]) for name in names]
        sizes = {name: len(each) for name, each in zip(names, values, strict=True)}
        if len(set(sizes.values())) > 1:
            raise InputError(f"{what}: columns of different lengths: {reprlib.repr(sizes)}")
    elif (array := _numbers(rows, len(columns), what)) is not None:
        return _finite(array, columns, what)
    else:
        values = _by_column(rows, names, what)
    coded = [
        [_value(each, column, f"{what}: row {row}") for row, each in enumerate(given)]
        for given, column in zip(values, columns, strict=True)
    ]
    return _finite(np.array(coded, np.float64).T, columns, what)


def check_values(values: Any, columns: Sequence[Column], what: str) -> Rows:
    """Return a regressor's values as float64 [N, outputs]; as `check_rows`, but none is missing.

    Raises:
        InputError: as `check_rows`, or a missing value.
    """
    found = check_rows(values, columns, what)
    if len(missing := np.argwhere(np.isnan(found))):
        row, column = missing[0]
        raise InputError(
            f"{what}: row {row} has no {columns[column].name!r}: leave out rows without a value"
        )
    return found


def _joined(names: Sequence[str]) -> str:
    text = ", ".join(names)
    return text if len(text) <= 500 else f"{text[:500]} …"


def _listed(values: Any) -> Sequence[Any]:
    """Return a column's values as Python's own; of a data frame or an array too."""
    array = getattr(values, "to_numpy", None)
    values = array() if callable(array) else values
    if isinstance(values, np.ndarray) and values.dtype.kind != "M":
        return list(values.tolist())
    return [values] if isinstance(values, str) else list(values)


def _numbers(rows: Any, columns: int, what: str) -> Rows | None:
    """Return an array of numbers [N, columns]; None for anything else than such an array."""
    if not hasattr(rows, "__array__"):
        return None
    try:
        array = np.asarray(rows)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{what} cannot be made into one array: {error}") from error
    if array.dtype.kind not in "uif":
        return None
    if columns == 1 and array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2 or array.shape[1] != columns:
        short = " or (N,)" if columns == 1 else ""
        raise InputError(f"{what} have shape {array.shape}, expected (N, {columns}){short}")
    return array.astype(np.float64)


def _by_column(rows: Any, names: list[str], what: str) -> list[list[Any]]:
    """Return the values of each column, from rows by name or by position."""
    if isinstance(rows, str) or not hasattr(rows, "__iter__"):
        raise InputError(f"{what} must be rows of {_joined(names)}, got {reprlib.repr(rows)}")
    found: list[list[Any]] = [[] for _ in names]
    for number, row in enumerate(rows):
        if isinstance(row, Mapping):
            missing = [name for name in names if name not in row]
            if missing:
                raise InputError(
                    f"{what}: row {number} has no {missing[0]!r}: give {_joined(names)}, None "
                    "where a value is missing"
                )
            row = [row[name] for name in names]
        elif isinstance(row, str) or not isinstance(row, Sequence | np.ndarray):
            row = [row]
        if len(row) != len(names):
            raise InputError(
                f"{what}: row {number} has {len(row)} values, expected {len(names)}: "
                f"{_joined(names)}"
            )
        for values, value in zip(found, row, strict=True):
            values.append(value)
    return found


def _value(value: Any, column: Column, where: str) -> float:
    if value is None or (isinstance(value, float | np.floating) and math.isnan(value)):
        return math.nan
    make: Callable[[Any], float] = {"number": _number, "date": _seconds}.get(column.kind) or (
        lambda name: _place(name, column.categories)
    )
    try:
        return make(value)
    except (TypeError, ValueError, OverflowError):
        raise InputError(
            f"{where}, column {column.name!r}: {reprlib.repr(value)} is no {column.kind}; None is "
            "missing"
        ) from None


def _number(value: Any) -> float:
    if isinstance(value, str | bytes | date | np.datetime64):
        raise TypeError
    return float(value)


def _seconds(value: Any) -> float:
    """Return seconds since 1970-01-01 UTC."""
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    if isinstance(value, np.datetime64):
        if np.isnat(value):
            return math.nan
        return float(value.astype("datetime64[us]").astype(np.int64)) / 1e6
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day, tzinfo=UTC)
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    return _number(value)


def _place(value: Any, categories: Sequence[str]) -> float:
    """Return a category's place; a number may be named as a whole one, as tables name it."""
    if isinstance(value, list | tuple | Mapping):
        raise TypeError
    names = [str(value)]
    if isinstance(value, float) and value.is_integer():
        names.append(str(int(value)))
    return float(next((categories.index(name) for name in names if name in categories), -1))


def _finite(rows: Rows, columns: Sequence[Column], what: str) -> Rows:
    if len(wrong := np.argwhere(np.isinf(rows))):
        row, column = wrong[0]
        raise InputError(
            f"{what}: row {row} is infinite in {columns[column].name!r}; NaN or None is missing"
        )
    return np.ascontiguousarray(rows)
