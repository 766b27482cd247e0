"""The files of an evaluation: metrics and plots as DVC reads them, and the report.

The same evaluation gives the same bytes: no times, no durations, no machine.
"""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from reptile.evaluate.confusions import confusions
from reptile.evaluate.measure import BASELINES, PATH_MODES, Evaluation, Score
from reptile.evaluate.report import render_report
from reptile.files import write_json
from reptile.objectives import CLASSIFICATION
from reptile.settings import BATCH_NORM_MODES

DIGITS = 5  # finer than any interval, coarser than rounding errors


def write_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Write metrics.json, settings.json, report.html and the plots' tables.

    These are accuracy_by_step.csv, or mean_squared_error_by_step.csv of a regressor; confusion.csv
    of a classifier; and accuracy_by_ways.csv where fewer ways were measured.
    """
    write_json(folder / "settings.json", evaluation.settings.model_dump(mode="json"))
    write_json(folder / "metrics.json", metrics(evaluation))
    _write_csv(folder / f"{evaluation.objective.metric}_by_step.csv", *_score_by_step(evaluation))
    if evaluation.objective is CLASSIFICATION:
        _write_csv(folder / "confusion.csv", ("actual", "predicted"), _confusion(evaluation))
    if evaluation.fewer_ways:
        _write_csv(folder / "accuracy_by_ways.csv", *_accuracy_by_ways(evaluation))
    (folder / "report.html").write_text(render_report(evaluation), encoding="utf-8")


def metrics(evaluation: Evaluation) -> dict[str, Any]:
    """Return all scores as nested plain numbers: dataset, then shots, then method."""
    nested: dict[str, Any] = {name: {} for name in evaluation.data}
    for measurement in evaluation.measurements:
        methods: dict[str, Any] = {}
        metric = measurement.objective.metric
        for mode in BATCH_NORM_MODES:
            methods[mode] = {}
            for start in evaluation.starts:
                prefix = "" if start == "trained" else f"{start}_"
                methods[mode] |= _rounded(prefix, metric, measurement.score(start, mode))
        baseline = BASELINES[measurement.objective].name
        methods[baseline] = _rounded("", metric, measurement.baseline_score())
        nested[measurement.dataset][f"{measurement.shots}-shot"] = methods
    return nested


def _rounded(prefix: str, metric: str, score: Score) -> dict[str, float]:
    mean, interval = score
    return {f"{prefix}{metric}": round(mean, DIGITS), f"{prefix}interval": round(interval, DIGITS)}


def _accuracy_by_ways(evaluation: Evaluation) -> tuple[Sequence[str], Iterable[Sequence[object]]]:
    rows = [
        [few.shots, few.ways]
        + [round(value, DIGITS) for score in (few.silenced, few.left_out) for value in score]
        for few in evaluation.fewer_ways
    ]
    columns = ("silenced", "silenced_interval", "left_out", "left_out_interval")
    return ("shots", "ways", *columns), rows


def _score_by_step(evaluation: Evaluation) -> tuple[Sequence[str], Iterable[Sequence[object]]]:
    """Held-out classes at the fewest shots, so that the columns' names hold for any settings."""
    measurement = evaluation.held_out[0]
    names = [(start, mode) for start in evaluation.starts for mode in PATH_MODES]
    rows = [
        [step, *(round(float(measurement.by_step[name][i].mean()), DIGITS) for name in names)]
        for i, step in enumerate(measurement.steps)
    ]
    return ["step", *(f"{start}_{mode}" for start, mode in names)], rows


def _confusion(evaluation: Evaluation) -> Iterable[Sequence[object]]:
    """One row a query of the dataset with the fewest classes, at the fewest shots."""
    name = evaluation.fewest_classes
    found = confusions(evaluation.data[name], evaluation.of(name)[:1])
    for actual, row in zip(found.classes, found.counts, strict=True):
        for predicted, count in zip(found.classes, row, strict=True):
            yield from [(actual.name, predicted.name)] * int(count)


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
