"""Every initialisation on every dataset: one table, trained on × tested on.

The tasks are those of `measure`; this module only tabulates their scores. No training.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reptile.data.dataset import PreparedData, load_prepared
from reptile.errors import InputError
from reptile.evaluate.measure import Measurement, evaluate
from reptile.files import atomic_directory, write_json
from reptile.learn.checkpoint import Checkpoint, load_checkpoint
from reptile.settings import BATCH_NORM_MODES, BatchNormMode, EvaluateSettings


@dataclass(frozen=True)
class Transfer:
    """All measurements: a row for each initialisation, a column for each dataset."""

    settings: EvaluateSettings
    ways: int
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: Mapping[tuple[str, str], tuple[Measurement, ...]]  # by shots; none where it would leak


def transfer(
    settings: EvaluateSettings,
    checkpoints: Mapping[str, Checkpoint],
    datasets: Mapping[str, PreparedData],
    on_progress: Callable[[int, int], None] | None = None,
) -> Transfer:
    """Evaluate every checkpoint on the test split of every dataset.

    A checkpoint is not tested on its training data split or prepared differently: classes that it
    was trained on might be among the test classes.

    Args:
        settings: the protocol.
        checkpoints: by the name of their row.
        datasets: by the name of their column; all of one image shape. The tasks have
            the least number of ways that the checkpoints were trained for.
        on_progress: called with the number of adaptations done, and the total.

    Raises:
        InputError: image shapes differ, or a dataset cannot make the tasks.
    """
    for row, checkpoint in checkpoints.items():
        for column, data in datasets.items():
            if data.image_shape != checkpoint.info.image_shape:
                raise InputError(
                    f"{row} was trained on images of {checkpoint.info.image_shape}, {column} has "
                    f"{data.image_shape}; prepare it with the same image_size and channels"
                )
    classes = min(len(data.split("test").starts) for data in datasets.values())
    ways = min(
        settings.task_ways(checkpoint.info.settings, classes) for checkpoint in checkpoints.values()
    )
    pairs = [
        (row, column)
        for row, checkpoint in checkpoints.items()
        for column, data in datasets.items()
        if not _leaks(checkpoint, data)
    ]
    cells: dict[tuple[str, str], tuple[Measurement, ...]] = {}
    for number, (row, column) in enumerate(pairs):

        def count(done: int, total: int, before: int = number) -> None:
            if on_progress:
                on_progress(before * total + done, len(pairs) * total)

        evaluation = evaluate(
            settings, checkpoints[row], datasets[column], {}, count, ways=ways, baselines=False
        )
        cells[row, column] = evaluation.measurements
    return Transfer(settings, ways, tuple(checkpoints), tuple(datasets), cells)


def transfer_markdown(result: Transfer, mode: BatchNormMode) -> str:
    """Return one table for each number of shots, in one mode of batch norm."""
    settings, parts = result.settings, []
    for number, shots in enumerate(sorted(set(settings.shots))):
        lines = [
            f"{result.ways}-way {shots}-shot accuracy, %, batch norm {mode.replace('_', '-')}:",
            "",
            f"| trained on | {' | '.join(f'tested on {name}' for name in result.columns)} |",
            "| --- " * (1 + len(result.columns)) + "|",
        ]
        rows: list[tuple[str, str, str]] = [(row, row, "trained") for row in result.rows]
        rows.append((f"nothing (random start of {result.rows[0]})", result.rows[0], "random"))
        for title, row, start in rows:
            scores = [
                _shown(measurements[number], start, mode) if measurements else "–"
                for measurements in (result.cells.get((row, column)) for column in result.columns)
            ]
            lines.append(f"| {title} | {' | '.join(scores)} |")
        parts.append("\n".join(lines))
    queries = "query" if settings.queries == 1 else "queries"
    steps = (
        f"{settings.tasks:,} tasks a cell, {settings.queries} {queries} a class, {settings.steps} "
        f"inner steps on batches of {settings.batch}; ± 95 % over the tasks."
    )
    note = (
        " A dash: the dataset may hold classes that the row was trained on."
        if len(result.cells) < len(result.rows) * len(result.columns)
        else ""
    )
    return "\n\n".join([*parts, steps + note]) + "\n"


def transfer_json(result: Transfer) -> dict[str, Any]:
    """Return every score as plain values, in all modes of batch norm."""
    return {
        "settings": result.settings.model_dump(mode="json"),
        "ways": result.ways,
        "cells": [
            {
                "trained_on": row,
                "tested_on": column,
                "shots": measurement.shots,
                "mode": mode,
                "start": start,
                "accuracy": measurement.score(start, mode).mean,
                "interval": measurement.score(start, mode).interval,
            }
            for (row, column), measured in result.cells.items()
            for measurement in measured
            for mode in BATCH_NORM_MODES
            for start in ("trained", "random")
            if start in measurement.methods
        ],
    }


def _leaks(checkpoint: Checkpoint, data: PreparedData) -> bool:
    """Say whether the test classes may be among those that the checkpoint was trained on."""
    info = checkpoint.info
    same = (info.data_sha256, info.splits_sha256) == (data.content_sha256, data.splits_sha256)
    return info.dataset == data.name and not same


def _shown(measurement: Measurement, start: str, mode: BatchNormMode) -> str:
    if start not in measurement.methods:  # an untrained closed-form learner, on data of others
        return "–"
    mean, interval = measurement.score(start, mode)
    return f"{100 * mean:.1f} ± {100 * interval:.1f}"


def transfer_runs(
    settings: EvaluateSettings,
    runs: Sequence[Path],
    datasets: Sequence[Path],
    output: Path,
    mode: BatchNormMode = "transductive",
    on_progress: Callable[[int, int], None] | None = None,
) -> str:
    """Test the checkpoint of every run on the data of every run; return the table as Markdown.

    Args:
        settings: the protocol.
        runs: artifacts folders, each with `checkpoint` and `prepared`.
        datasets: further prepared folders, to test on only.
        output: folder for transfer.json, with everything, and transfer.md.
        mode: batch norm in the Markdown.
        on_progress: called with the number of adaptations done, and the total.
    """
    checkpoints: dict[str, Checkpoint] = {}
    columns: dict[str, PreparedData] = {}
    for run in runs:
        checkpoint = load_checkpoint(run / "checkpoint")
        checkpoints[_name(checkpoint.info.dataset, run, checkpoints)] = checkpoint
    for folder in (*(run / "prepared" for run in runs), *datasets):
        data = load_prepared(folder)
        if not any(data.index == other.index for other in columns.values()):
            columns[_name(data.name, folder, columns)] = data
    result = transfer(settings, checkpoints, columns, on_progress)
    text = transfer_markdown(result, mode)
    with atomic_directory(output) as temporary:
        write_json(temporary / "transfer.json", transfer_json(result))
        (temporary / "transfer.md").write_text(text, encoding="utf-8")
    return text


def _name(name: str, folder: Path, taken: Collection[str]) -> str:
    """Return a name for people that no other has."""
    return f"{name} ({folder})" if name in taken else name
