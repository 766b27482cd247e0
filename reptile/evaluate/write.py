"""The files of an evaluation: metrics and plots as DVC reads them, and the report.

The same evaluation gives the same bytes: no times, no durations, no machine.
"""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from reptile.evaluate.adapting import PATH_MODES
from reptile.evaluate.confusions import confusions
from reptile.evaluate.measure import Evaluation, Measurement
from reptile.evaluate.metrics import DIGITS, METRICS_FILE, ByMethod, Metrics, Score, Scores
from reptile.evaluate.report import render_report
from reptile.files import write_json
from reptile.objectives import CLASSIFICATION
from reptile.settings import BATCH_NORM_MODES


def write_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Write metrics.json, settings.json, report.html and the plots' tables.

    These are accuracy_by_step.csv, or mean_squared_error_by_step.csv of a regressor, where a
    learner takes gradient steps; and confusion.csv of a classifier.
    """
    write_json(folder / "settings.json", evaluation.settings.model_dump(mode="json"))
    write_json(folder / METRICS_FILE, metrics(evaluation).model_dump(mode="json"))
    if evaluation.starts:
        path = folder / f"{evaluation.objective.metric}_by_step.csv"
        _write_csv(path, *_score_by_step(evaluation))
    if evaluation.objective is CLASSIFICATION:
        _write_csv(folder / "confusion.csv", ("actual", "predicted"), _confusion(evaluation))
    (folder / "report.html").write_text(render_report(evaluation), encoding="utf-8")


def metrics(evaluation: Evaluation) -> Metrics:
    """Return all scores, rounded."""
    scores: Scores = {}
    differences: Scores = {}
    strengths: dict[str, dict[int, float]] = {}
    coverage: dict[str, dict[int, dict[str, Score]]] = {}
    for measured in evaluation.measurements:
        by_method: ByMethod = {
            method: {
                mode: measured.score(method, mode).rounded() for mode in measured.modes(method)
            }
            for method in measured.methods
        }
        scores.setdefault(measured.dataset, {})[measured.shots] = by_method
        against = _differences(measured, evaluation.learner)
        differences.setdefault(measured.dataset, {})[measured.shots] = against
        for method, value in measured.strengths.items():
            strengths.setdefault(method, {})[measured.shots] = float(f"{value:.6g}")
        if measured.coverage:
            coverage.setdefault(measured.dataset, {})[measured.shots] = {
                method: Score.of(values).rounded() for method, values in measured.coverage.items()
            }
    return Metrics(
        objective=evaluation.objective.name,
        metric=evaluation.objective.metric,
        ways=evaluation.ways,
        held_out=evaluation.held_out[0].dataset,
        learner=evaluation.learner,
        beside=tuple(evaluation.beside),
        chosen=evaluation.choice,
        scores=scores,
        differences=differences,
        strengths=strengths,
        coverage=coverage,
        interval_scales=dict(evaluation.interval_scales),
    )


def _differences(measured: Measurement, learner: str) -> ByMethod:
    """Return each other method's difference to the learner, in every mode of either."""
    found: ByMethod = {}
    for method in measured.methods:
        if method != learner:
            modes = {*measured.modes(method), *measured.modes(learner)}
            found[method] = {
                mode: measured.difference(method, learner, mode).rounded()
                for mode in ("none", *BATCH_NORM_MODES)
                if mode in modes and (mode != "none" or modes == {"none"})
            }
    return found


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
    confusion = confusions(evaluation.data[name], evaluation.of(name)[:1])
    for actual, row in zip(confusion.classes, confusion.counts, strict=True):
        for predicted, count in zip(confusion.classes, row, strict=True):
            yield from [(actual.name, predicted.name)] * int(count)


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
