"""The files of an evaluation: metrics and plots as DVC reads them, and the report.

The same evaluation gives the same bytes: no times, no durations, no machine.
"""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from reptile.config import BATCH_NORM_MODES
from reptile.evaluate.confusions import confusions
from reptile.evaluate.measure import PATH_MODES, STARTS, Evaluation, Score
from reptile.evaluate.report import render_report
from reptile.files import write_json

DIGITS = 5  # of a share: finer than any interval, coarser than rounding errors


def write_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Write metrics.json, settings.json, accuracy_by_step.csv, confusion.csv and report.html."""
    write_json(folder / "settings.json", evaluation.settings.model_dump(mode="json"))
    write_json(folder / "metrics.json", metrics(evaluation))
    _write_csv(folder / "accuracy_by_step.csv", *_accuracy_by_step(evaluation))
    _write_csv(folder / "confusion.csv", ("actual", "predicted"), _confusion(evaluation))
    (folder / "report.html").write_text(render_report(evaluation), encoding="utf-8")


def metrics(evaluation: Evaluation) -> dict[str, Any]:
    """Return all scores as nested plain numbers: dataset, then shots, then method."""
    nested: dict[str, Any] = {name: {} for name in evaluation.data}
    for measurement in evaluation.measurements:
        methods: dict[str, Any] = {}
        for mode in BATCH_NORM_MODES:
            methods[mode] = _rounded("", measurement.score("trained", mode)) | _rounded(
                "random_", measurement.score("random", mode)
            )
        methods["nearest_mean"] = _rounded("", measurement.nearest_mean_score())
        nested[measurement.dataset][f"{measurement.shots}-shot"] = methods
    return nested


def _rounded(prefix: str, score: Score) -> dict[str, float]:
    mean, interval = score
    return {f"{prefix}accuracy": round(mean, DIGITS), f"{prefix}interval": round(interval, DIGITS)}


def _accuracy_by_step(evaluation: Evaluation) -> tuple[Sequence[str], Iterable[Sequence[object]]]:
    """Held-out classes at the fewest shots, so that the columns' names hold for any settings."""
    measurement = evaluation.held_out[0]
    names = [(start, mode) for start in STARTS for mode in PATH_MODES]
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
