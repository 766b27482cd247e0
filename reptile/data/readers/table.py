"""A table from a CSV or Parquet file, checked and typed, as DuckDB reads it: larger than memory.

A row of an error is counted from 1, without the header and without empty lines. Not for what is
learnt from the rows (see `data.tables`).
"""

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import duckdb

from reptile.cpus import available_cpus
from reptile.data.names import SPACES, normal
from reptile.errors import InputError
from reptile.settings import TableSettings

SUFFIXES = (".csv", ".tsv", ".parquet")
SEPARATORS = ",;\t|"
MISSING = ("", "na", "n/a", "nan", "null", "none")
MEMORY = "400MB"  # of DuckDB; beyond it rows go to the folder of its files
MAX_HEADER = 2**20
INTEGERS = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT")
NUMBERS = (*INTEGERS, "FLOAT", "DOUBLE", "BOOLEAN")

Kind = Literal["number", "date", "category"]
TYPED: dict[str, Kind] = {"DOUBLE": "number", "TIMESTAMP": "date"}
"""The kinds that a Parquet file tells; text is examined as that of a CSV file is."""


@dataclass(frozen=True)
class Table:
    """The rows of a table as DuckDB's relation `cells`: row, place in the order, task, columns.

    `columns` maps each input and target to its name there and its kind: numbers and dates (seconds
    since 1970-01-01 UTC) are DOUBLE, categories VARCHAR; all may be NULL where a value is missing.
    """

    name: str
    database: duckdb.DuckDBPyConnection
    columns: dict[str, tuple[str, Kind]]


def is_table(source: str) -> bool:
    """Say whether the path of a source is that of a table, by its suffix."""
    return Path(source).suffix.casefold() in SUFFIXES


@contextmanager
def open_table(source: str, settings: TableSettings, order: str, folder: Path) -> Iterator[Table]:
    """Read and check the columns of a table that the settings name.

    Args:
        source: path of a .csv, .tsv or .parquet file.
        settings: the columns.
        order: the column to sort by; empty for the order of the rows.
        folder: an empty one, for DuckDB's files, which may become as large as the table.

    Raises:
        InputError: the file cannot be read, lacks a column, or a value cannot be used.
    """
    path = Path(source)
    if not path.is_file():
        raise InputError(f"{source}: no such file")
    for setting in ("inputs", "targets"):
        if not getattr(settings, setting):
            raise InputError(f"prepare.table.{setting} is empty: name columns of {source}")
    if settings.kind == "values" and not settings.task:
        raise InputError(
            f"prepare.table.task is empty: name the column of {source} that tells tasks apart"
        )
    database = duckdb.connect(
        str(folder / "table.duckdb"),
        config={
            "memory_limit": MEMORY,
            "threads": str(min(4, available_cpus())),
            "temp_directory": str(folder),
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
        },
    )
    try:
        database.execute("SET TimeZone = 'UTC'")  # what a time without an offset is taken for
        yield _Reader(source, settings, order, database, folder).read()
    except duckdb.Error as error:
        raise InputError(f"{source}: {_first_line(error)}") from None
    finally:
        database.close()


def _first_line(error: duckdb.Error) -> str:
    return str(error).strip().splitlines()[0]


def quoted(text: str) -> str:
    """Return an SQL string."""
    return "'" + text.replace("'", "''") + "'"


class _Reader:
    """Reads the cells as text (or as Parquet's types), then checks and types column by column."""

    def __init__(
        self,
        source: str,
        settings: TableSettings,
        order: str,
        database: duckdb.DuckDBPyConnection,
        folder: Path,
    ) -> None:
        self.source, self.settings, self.order = source, settings, order
        self.database, self.path = database, Path(source)
        wanted = (settings.task, order, *settings.inputs, *settings.targets)
        self.wanted = list(dict.fromkeys(name for name in wanted if name))
        self.text = {settings.task, *settings.categories}  # what only is to be told apart
        if settings.kind == "classes":
            self.text |= set(settings.targets)
        if any(char in source for char in "*?["):  # DuckDB would look for a pattern
            self.path = folder / f"source{self.path.suffix.casefold()}"
            self.path.symlink_to(Path(source).resolve())

    def read(self) -> Table:
        parquet = self.path.suffix.casefold() == ".parquet"
        header, types, relation = self._parquet() if parquet else self._text()
        names = {name: f"c{header.index(name)}" for name in self.wanted}
        chosen = ", ".join(
            f"{self._cleaned(header.index(name), types)} AS {names[name]}" for name in self.wanted
        )
        self._materialise(f"SELECT row_number() OVER () AS row, {chosen} FROM {relation}")
        if not self._one("SELECT count(*) FROM raw"):
            raise InputError(f"{self.source}: no rows below the header")

        typed = {name: TYPED.get(types[header.index(name)]) for name in self.wanted}
        kinds: dict[str, Kind] = {
            name: "category" if name in self.text else self._kind(name, names[name], typed[name])
            for name in self.wanted
        }
        for name in self.wanted:
            self._check(name, names[name], kinds[name], typed[name])
        cells = {name: self._typed(names[name], kinds[name], typed[name]) for name in self.wanted}
        task = cells.get(self.settings.task, "''")
        place = cells[self.order] if self.order else "row"
        columns = {
            name: (f"v{number}", kinds[name])
            for number, name in enumerate((*self.settings.inputs, *self.settings.targets))
        }
        listed = ", ".join(f"{cells[name]} AS {column}" for name, (column, _) in columns.items())
        needed = [task, place, *(cells[name] for name in self.settings.targets)]
        complete = " AND ".join(f"({cell}) IS NOT NULL" for cell in needed)
        self.database.execute(
            f"CREATE VIEW cells AS SELECT row, {place} AS place, {task} AS task, {listed} "
            f"FROM raw WHERE {complete}"
        )
        return Table(Path(self.source).stem, self.database, columns)

    def _text(self) -> tuple[list[str], list[str], str]:
        """Return the header, the type of each column, and the relation of columns c0, c1, …."""
        header, separator = self._header()
        columns = ", ".join(f"'c{place}': 'VARCHAR'" for place in range(len(header)))
        relation = (
            f"read_csv({quoted(str(self.path))}, auto_detect = false, header = true, "
            f"columns = {{{columns}}}, delim = {quoted(separator)}, quote = '\"', escape = '\"', "
            "strict_mode = true)"
        )
        return header, ["VARCHAR"] * len(header), relation

    def _header(self) -> tuple[list[str], str]:
        with self.path.open("rb") as file:
            line = file.readline(MAX_HEADER)
        if not line.strip():
            raise InputError(f"{self.source}: the first line is empty; it must name the columns")
        try:
            text = line.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise self._not_utf8("the header") from None
        if "\0" in text:
            raise self._not_utf8("the header")
        try:
            split = {
                separator: [
                    normal(name.strip()) for name in next(csv.reader([text], delimiter=separator))
                ]
                for separator in SEPARATORS
            }
        except csv.Error:
            raise InputError(
                f"{self.source}: the first line cannot be read as a header; save the table anew, "
                "with its lines ended by LF"
            ) from None
        separator = max(
            SEPARATORS, key=lambda each: (len({*self.wanted} & {*split[each]}), len(split[each]))
        )
        self._check_header(split[separator])
        return split[separator], separator

    def _check_header(self, header: list[str]) -> None:
        for name in self.wanted:
            if header.count(name) > 1:
                raise InputError(
                    f"{self.source}: column {name!r} is there {header.count(name)} times; "
                    "rename all but one"
                )
            if name not in header:
                shown = ", ".join(map(repr, header[:20])) + (", …" if len(header) > 20 else "")
                raise InputError(f"{self.source}: no column {name!r}; its columns are {shown}")

    def _not_utf8(self, where: str) -> InputError:
        return InputError(f"{self.source}: {where} is not UTF-8; save the table as UTF-8")

    def _parquet(self) -> tuple[list[str], list[str], str]:
        relation = f"read_parquet({quoted(str(self.path))})"
        try:
            described = self.database.execute(f"DESCRIBE SELECT * FROM {relation}").fetchall()
        except duckdb.Error as error:
            raise InputError(f"{self.source}: is no Parquet file ({_first_line(error)})") from None
        header = [normal(str(name)) for name, *_ in described]
        self._check_header(header)
        types: list[str] = []
        for name, (_, kind, *_) in zip(header, described, strict=True):
            plain = str(kind).removeprefix("U").partition("(")[0]
            dated = plain == "DATE" or plain.startswith("TIMESTAMP")
            if name in self.text and (dated or plain in INTEGERS):
                types.append("VARCHAR")  # a DOUBLE would make two large numbers one
            elif plain in NUMBERS or plain == "DECIMAL":
                types.append("DOUBLE")
            elif dated:
                types.append("TIMESTAMP")
            elif plain in ("VARCHAR", "ENUM"):
                types.append("VARCHAR")
            elif name in self.wanted:
                raise InputError(
                    f"{self.source}: column {name!r} is of type {kind}; it must hold numbers, "
                    "text or dates"
                )
            else:
                types.append(plain)
        names = ", ".join(f"c{place}" for place in range(len(header)))
        return header, types, f"{relation} AS source({names})"

    def _cleaned(self, place: int, types: list[str]) -> str:
        column = f"c{place}"
        if types[place] == "TIMESTAMP":
            return f"epoch({column}::TIMESTAMP)"
        if types[place] == "DOUBLE":
            return f"CASE WHEN isnan({column}::DOUBLE) THEN NULL ELSE {column}::DOUBLE END"
        missing = ", ".join(map(quoted, MISSING))
        text = f"trim({column}::VARCHAR, {quoted(SPACES)})"
        return f"CASE WHEN lower({text}) IN ({missing}) THEN NULL ELSE {text} END"

    def _materialise(self, query: str) -> None:
        try:
            self.database.execute(f"CREATE TABLE raw AS {query}")
        except duckdb.Error as error:
            lines = str(error).splitlines()
            line = lines[0].rpartition("Line: ")[2] if "Line: " in lines[0] else "?"
            if "not utf-8" in str(error) or "nvalid unicode" in str(error):
                raise self._not_utf8(f"line {line}") from None
            if "unterminated quote" in str(error):
                reason = f"line {line} has a quotation mark that is never closed"
            elif counts := [each for each in lines if each.startswith("Expected Number of Col")]:
                expected, _, found = (
                    counts[0].removeprefix("Expected Number of Columns: ").partition(" Found: ")
                )
                reason = (
                    f"line {line} has {found} columns, the header {expected}; put values that "
                    "hold the separator into quotation marks"
                )
            elif "invalid state" in str(error):
                reason = (
                    "its lines end in several ways (CR LF and LF), or it is no text; save it anew"
                )
            else:
                reason = f"cannot be read ({_first_line(error)})"
            raise InputError(f"{self.source}: {reason}") from None

    def _one(self, query: str) -> Any:
        row = self.database.execute(query).fetchone()
        return row[0] if row else None

    def _number(self, column: str) -> str:
        if self.settings.decimal == ",":
            comma = f"TRY_CAST(replace({column}, ',', '.') AS DOUBLE)"
            return f"CASE WHEN contains({column}, '.') THEN NULL ELSE {comma} END"
        return f"TRY_CAST({column} AS DOUBLE)"

    def _typed(self, column: str, kind: Kind, typed: Kind | None) -> str:
        if kind == "category":
            whole = f"({column} = floor({column}) AND abs({column}) < 1e15)"
            return (
                f"CASE WHEN {whole} THEN {column}::BIGINT::VARCHAR ELSE {column}::VARCHAR END"
                if typed
                else f"nfc_normalize({column})"
            )
        if typed:
            return column
        if kind == "number":
            return self._number(column)
        return _seconds(column)

    def _kind(self, name: str, column: str, typed: Kind | None) -> Kind:
        """Return the kind of a column that all its values have, or nearly none of any."""
        if typed:
            return typed
        present, numbers, dates, alike = self.database.execute(
            f"SELECT count({column}), count({self._number(column)}), count({_seconds(column)}), "
            f"count(*) FILTER (regexp_matches({column}, '^\\d{{1,4}}[./-]\\d{{1,2}}[./-]\\d{{2,4}}'"
            ")) FROM raw"
        ).fetchone() or (0, 0, 0, 0)
        if not present:
            raise InputError(f"{self.source}: column {name!r} is empty; leave it out")
        if numbers == present:
            return "number"
        if dates == present:
            return "date"
        if 2 * max(alike, dates) >= present:
            row, value = self._first(column, f"{_seconds(column)} IS NULL")
            raise InputError(
                f"{self.source}: column {name!r}, row {row}: {value!r} is no date; write dates as "
                "2024-12-31 or 2024-12-31 23:59:59"
            )
        must = name in self.settings.targets or name == self.order
        if must or 2 * numbers >= present:
            raise self._no_number(name, column)
        mark = "." if self.settings.decimal == "," else ","
        other = f"TRY_CAST(replace({column}, '{mark}', '') AS DOUBLE)"
        if 2 * self._one(f"SELECT count({other}) FROM raw") >= present:
            raise self._no_number(name, column)
        return "category"

    def _first(self, column: str, wrong: str) -> tuple[int, str]:
        row, value = self.database.execute(
            f"SELECT row, {column} FROM raw WHERE {column} IS NOT NULL AND {wrong} "
            "ORDER BY row LIMIT 1"
        ).fetchone() or (0, "")
        return int(row), str(value)[:50]

    def _no_number(self, name: str, column: str) -> InputError:
        row, value = self._first(column, f"{self._number(column)} IS NULL")
        way_out = "correct it"
        other = "." if self.settings.decimal == "," else ","
        if other in value:
            way_out = (
                "write numbers without thousands separators, or set prepare.table.decimal to "
                f"{other!r}"
            )
        elif name in self.settings.inputs:
            way_out = "correct it, or name the column in prepare.table.categories"
        return InputError(
            f"{self.source}: column {name!r}, row {row}: {value!r} is no number; {way_out}"
        )

    def _check(self, name: str, column: str, kind: Kind, typed: Kind | None) -> None:
        if kind != "category":
            cell = self._typed(column, kind, typed)
            row = self._one(f"SELECT min(row) FROM raw WHERE NOT isfinite({cell})")
            if row is not None:
                raise InputError(
                    f"{self.source}: column {name!r}, row {row}: the number is not finite; correct "
                    "it, or leave it empty"
                )
        if self.settings.missing == "refuse":
            rows, first = self.database.execute(
                f"SELECT count(*), min(row) FROM raw WHERE {column} IS NULL"
            ).fetchone() or (0, 0)
            if rows:
                more = f" and in {rows - 1:,} more" if rows > 1 else ""
                raise InputError(
                    f"{self.source}: column {name!r} has no value in row {first}{more}; set "
                    "prepare.table.missing to fill, or leave such rows or the column out"
                )
        if self._one(f"SELECT count({column}) FROM raw") == 0:
            raise InputError(f"{self.source}: column {name!r} is empty; leave it out")


def _seconds(column: str) -> str:
    moment = f"TRY_CAST({column} AS TIMESTAMPTZ)"  # a TIMESTAMP would drop the offset
    return f"CASE WHEN isfinite({moment}) THEN epoch({moment}) END"
