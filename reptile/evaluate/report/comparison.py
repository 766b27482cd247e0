"""The report's first table: every method on the same tasks, with its difference to the learner."""

from typing import NamedTuple

from reptile.evaluate.measure import Evaluation, Measurement
from reptile.evaluate.methods import METHODS, in_order, title
from reptile.evaluate.metrics import Score
from reptile.settings import BatchNormMode, second_learner

HEADLINE_MODE: BatchNormMode = "frozen"  # queries independent, as the exported model predicts


class Cell(NamedTuple):
    """A method at one number of shots."""

    score: Score
    difference: Score | None  # of the method to the learner; None for the learner itself
    verdict: str  # `better` or `worse` where the difference exceeds its interval


class ComparedMethod(NamedTuple):
    """A row of the table."""

    name: str
    title: str
    is_learner: bool
    is_beside: bool
    cells: list[Cell | None]


class ComparedData(NamedTuple):
    """The table of one dataset."""

    dataset: str
    shots: list[int]
    methods: list[ComparedMethod]


def comparison_tables(evaluation: Evaluation) -> list[ComparedData]:
    """Return a table for each dataset, batch norm frozen."""
    tables = []
    for dataset in evaluation.data:
        measured = evaluation.of(dataset)
        methods = [
            ComparedMethod(
                name,
                shown_title(evaluation, name),
                name == evaluation.learner,
                name in evaluation.beside,
                [_cell(evaluation, name, each) for each in measured],
            )
            for name in in_order(name for each in measured for name in each.methods)
        ]
        tables.append(ComparedData(dataset, [each.shots for each in measured], methods))
    return tables


def _cell(evaluation: Evaluation, method: str, measured: Measurement) -> Cell:
    score = measured.score(method, HEADLINE_MODE)
    if method == evaluation.learner:
        return Cell(score, None, "")
    difference = measured.difference(method, evaluation.learner, HEADLINE_MODE)
    verdict = ""
    if abs(difference.mean) > difference.interval:
        better = evaluation.objective.better * difference.mean > 0
        verdict = "better" if better else "worse"
    return Cell(score, difference, verdict)


def shown_title(evaluation: Evaluation, method: str) -> str:
    """Return a method's title with the algorithm that trained it."""
    if method == "trained":
        return f"{title(method)} ({evaluation.checkpoint.settings.algorithm})"
    if method in evaluation.beside:
        algorithm = evaluation.beside[method].settings.algorithm
        if method != second_learner(algorithm):  # a name of the user's, which says nothing of it
            return f"{method} ({algorithm})"
    return title(method)


def notes(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Return title and explanation of each method that was measured."""
    names = in_order(name for each in evaluation.measurements for name in each.methods)
    return [
        (shown_title(evaluation, name), METHODS[name].note if name in METHODS else BESIDE)
        for name in names
    ]


BESIDE = "Another network, trained on the same data, learning a task as it was trained to."
