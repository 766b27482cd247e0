"""From a table to the prepared dataset: tasks and their splits, and the coding of the columns.

Everything that is learnt from the table is learnt on the training split. Not for reading the file
(see `readers.table`).
"""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
from numpy.lib.format import write_array_header_1_0

from reptile.data.coding import CategoryCoding, Coding, Columns, InputCoding, NumberCoding
from reptile.data.dataset import (
    HASH_BLOCK,
    IMAGES_FILE,
    INDEX_FILE,
    TARGETS_FILE,
    DatasetIndex,
    PreparedClass,
    PreparedData,
    content_header,
    load_prepared,
    splits_digest,
)
from reptile.data.names import can_be_shown, refuse_two_spellings
from reptile.data.readers.base import Source, SourceClass
from reptile.data.readers.table import Kind, Table, open_table
from reptile.data.splits import assign_splits, groups_or_classes
from reptile.errors import InputError
from reptile.files import atomic_directory, write_json
from reptile.settings import PrepareSettings

log = logging.getLogger(__name__)

BLOCK = 2**16  # rows at once
MAX_CATEGORIES = 100
SHOWN = 5


def prepare_table(
    settings: PrepareSettings, folder: Path, progress: Callable[[int, int], None] | None = None
) -> PreparedData:
    """Prepare the rows of a table; replace `folder` in one step.

    A class of the prepared data is a task of the table (`kind: values`), or a class of a group. The
    rows of each lie together: in the order of the order column, or of the file. Tasks with fewer
    rows than `images_per_class` are left out.

    Args:
        settings: the source, its columns, and what is held out.
        folder: where to write `images.npy` (coded inputs [N, D]), `targets.npy` (coded values) and
            `dataset.json`.
        progress: called with the rows written so far, and all there are.

    Raises:
        InputError: the table or the settings cannot be used; `folder` is as it was before.
    """
    order = settings.order if isinstance(settings.order, str) else ""
    with (
        atomic_directory(folder) as temporary,
        TemporaryDirectory(dir=temporary) as work,
        open_table(settings.source, settings.table, order, Path(work)) as table,
    ):
        classes = _classes(table, settings)
        _sort(table, classes)
        _write(table, classes, _coding(table, settings), settings, temporary, progress)
    return load_prepared(folder)


def _classes(table: Table, settings: PrepareSettings) -> tuple[PreparedClass, ...]:
    """Return the tasks, or the classes of each group, with enough rows, in the order of names."""
    chosen, least = settings.table, settings.images_per_class
    what = "task"
    name, group = "task", "''"
    if chosen.kind == "classes":
        label, _ = table.columns[chosen.targets[0]]
        what, name, group = "class", label, "task"
        if chosen.task:
            name = f"task || '/' || {label}"
    table.database.execute(
        f"CREATE VIEW named AS SELECT *, {name} AS name, {group} AS class_group FROM cells"
    )
    rows = table.database.execute(
        "SELECT name, class_group, count(*) FROM named GROUP BY ALL ORDER BY 1, 2"
    ).fetchall()
    kept = [row for row in rows if row[2] >= least]
    if short := [row for row in rows if row[2] < least]:
        names = ", ".join(str(row[0]) for row in short[:SHOWN])
        more = ", …" if len(short) > SHOWN else ""
        left_out = (
            f"{table.name}: {len(short):,} of {len(rows):,} with fewer rows than "
            f"images_per_class = {least} ({names}{more})"
        )
        if len(kept) < 2:
            raise InputError(f"{left_out}, and at least 2 must remain; lower that setting")
        log.warning("%s are left out", left_out)
    if len(kept) < 2:
        raise InputError(
            f"{table.name}: {len(kept)} {what} in all; training and test need one each"
        )
    for text, *_ in kept:
        if not text or not can_be_shown(text):
            raise InputError(f"{table.name}: the name {text!r} cannot be shown; choose another")
    if chosen.kind == "values":
        refuse_two_spellings(f"{table.name}: {chosen.task}", ([row[0]] for row in kept))
    source = Source(
        table.name,
        tuple(SourceClass(text, of, ()) for text, of, _ in kept),
        _unread,
        no_split="a table tells no split",
    )
    splits = assign_splits(source, groups_or_classes(source, settings))
    starts = np.cumsum([0, *(count for *_, count in kept)])
    return tuple(
        PreparedClass(
            name=text, group=of, split=splits[text], rotation=0, start=int(start), count=count
        )
        for (text, of, count), start in zip(kept, starts[:-1], strict=True)
    )


def _unread(file: str) -> Any:
    raise AssertionError(f"{file}: tables have no files")


def _sort(table: Table, classes: tuple[PreparedClass, ...]) -> None:
    """Make the relation `sorted`: the rows of the classes, in their order, training ones marked."""
    chosen = {
        "name": np.array([c.name for c in classes], dtype=object),
        "number": np.arange(len(classes)),
        "train": np.array([c.split == "train" for c in classes]),
    }
    table.database.register("chosen", chosen)
    columns = ", ".join(column for column, _ in table.columns.values())
    table.database.execute(
        f"CREATE TABLE sorted AS SELECT number, train, {columns} FROM named JOIN chosen "
        "USING (name) ORDER BY number, place, row"
    )
    table.database.unregister("chosen")


def _coding(table: Table, settings: PrepareSettings) -> Coding:
    chosen = settings.table
    # Sums of floating-point numbers depend on their order: one thread gives the same each time.
    table.database.execute("SET threads TO 1")
    inputs = tuple(_coding_of(table, name) for name in chosen.inputs)
    targets = () if chosen.kind == "classes" else tuple(_scaling(table, n) for n in chosen.targets)
    return Coding(inputs=inputs, targets=targets)


def _coding_of(table: Table, name: str) -> InputCoding:
    column, kind = table.columns[name]
    if kind != "category":
        return _scaling(table, name)
    values = table.database.execute(
        f"SELECT {column}, count(DISTINCT number) FROM sorted WHERE train AND {column} IS NOT NULL "
        "GROUP BY 1 ORDER BY 2 DESC, 1"
    ).fetchall()
    if len(values) < 2:
        raise _constant(table, name)
    categories = [value for value, tasks in values if tasks > 1][:MAX_CATEGORIES]
    if not categories:
        raise InputError(
            f"{table.name}: column {name!r}: no category is in two tasks of the training split, so "
            "nothing can be learnt about it; leave the column out"
        )
    return CategoryCoding(kind="category", column=name, categories=tuple(categories))


def _scaling(table: Table, name: str) -> NumberCoding:
    column, kind = table.columns[name]
    try:
        mean, deviation, least, most = table.database.execute(
            f"SELECT avg({column}), stddev_pop({column}), min({column}), max({column}) "
            "FROM sorted WHERE train"
        ).fetchone() or (None, None, None, None)
    except duckdb.OutOfRangeException:
        mean, deviation, least, most = None, None, -np.inf, np.inf
    if most is None:
        raise InputError(
            f"{table.name}: column {name!r} has no value in the training split; leave it out"
        )
    if least == most:
        raise _constant(table, name)
    if mean is None or not 0 < deviation < np.inf or not np.isfinite(mean):
        raise InputError(
            f"{table.name}: column {name!r}: its values have no finite variance; give them in a "
            "larger or smaller unit"
        )
    return NumberCoding(
        kind="date" if kind == "date" else "number", column=name, mean=mean, deviation=deviation
    )


def _constant(table: Table, name: str) -> InputError:
    return InputError(
        f"{table.name}: column {name!r} has one value alone in all rows of the training split; "
        "leave it out"
    )


def _write(
    table: Table,
    classes: tuple[PreparedClass, ...],
    coding: Coding,
    settings: PrepareSettings,
    folder: Path,
    progress: Callable[[int, int], None] | None,
) -> None:
    rows = classes[-1].start + classes[-1].count
    shape = (rows, sum(each.width for each in coding.inputs))
    digest = hashlib.sha256(content_header(shape, classes))
    with (
        (folder / IMAGES_FILE).open("wb") as inputs,
        (folder / TARGETS_FILE).open("w+b") as targets,
    ):
        _header(inputs, shape)
        if coding.targets:
            _header(targets, (rows, len(coding.targets)))
        first = targets.tell()
        for start in range(0, rows, BLOCK):
            columns = _read(table, start, min(rows, start + BLOCK))
            content = _finite(coding.encode_inputs(columns), table, classes, start).data
            inputs.write(content)
            digest.update(content)
            if coding.targets:
                targets.write(_finite(coding.encode_targets(columns), table, classes, start).data)
            if progress is not None:
                progress(min(rows, start + BLOCK), rows)
        targets.seek(first)
        while block := targets.read(HASH_BLOCK):
            digest.update(block)
    if not coding.targets:
        (folder / TARGETS_FILE).unlink()
    index = DatasetIndex(
        name=table.name,
        image_shape=shape[1:],
        classes=classes,
        content_sha256=digest.hexdigest(),
        splits_sha256=splits_digest(classes),
        settings=settings.model_dump(mode="json"),
        dtype="float32",
        values=len(coding.targets),
        coding=coding,
        ordered=bool(settings.order),
    )
    write_json(folder / INDEX_FILE, index.model_dump(mode="json"))


def _header(file: Any, shape: tuple[int, ...]) -> None:
    write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})


def _read(table: Table, start: int, end: int) -> Columns:
    """Return rows of `sorted`, in its order."""
    fetched = table.database.execute(
        f"SELECT * FROM sorted WHERE rowid >= {start} AND rowid < {end}"
    ).fetchnumpy()
    return {name: _filled(fetched[column], kind) for name, (column, kind) in table.columns.items()}


def _filled(column: Any, kind: Kind) -> npt.NDArray[Any]:
    if not isinstance(column, np.ma.MaskedArray):
        return np.asarray(column)
    return np.asarray(column.filled(None if kind == "category" else np.nan))


def _finite(
    coded: npt.NDArray[np.float32], table: Table, classes: tuple[PreparedClass, ...], start: int
) -> npt.NDArray[np.float32]:
    """Refuse numbers that are too large for float32 after scaling."""
    wrong = np.flatnonzero(~np.isfinite(coded).all(1))
    if len(wrong):
        row = start + int(wrong[0])
        owner = next(c for c in classes if row < c.start + c.count)
        raise InputError(
            f"{table.name}: {owner.name} has a value in its row {row - owner.start + 1} that is "
            "far outside of the training split's; correct it"
        )
    return coded
