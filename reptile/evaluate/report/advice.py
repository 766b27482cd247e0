"""The report's first words: which learner validation tasks choose, and which to ship when."""

from reptile.evaluate.measure import Evaluation
from reptile.evaluate.metrics import Choice, Score
from reptile.evaluate.report.comparison import HEADLINE_MODE, shown_title


def advice(evaluation: Evaluation) -> list[str]:
    """Return sentences, each a paragraph."""
    choice = evaluation.choice
    if choice is None:
        return []
    closed, gradient = _kinds(evaluation, choice)
    paragraphs = [_chosen(evaluation, choice)]
    away = [_elsewhere(evaluation, choice, name) for name in list(evaluation.data)[1:]]
    paragraphs += [sentence for sentence in away if sentence]
    if closed and gradient:
        steps = evaluation.settings.steps
        paragraphs.append(
            f"Ship a closed-form learner where it is at least as good: it learns a task in one "
            f"forward pass, of any number of classes, and a class can be added later. Ship the "
            f"learner of gradient steps where it is better on tasks like yours; it takes up to "
            f"{_outputs(evaluation)} classes and {steps} steps a task."
        )
    return paragraphs


def _chosen(evaluation: Evaluation, choice: Choice) -> str:
    unit = f" {evaluation.objective.unit}" if evaluation.objective.unit else ""
    best = evaluation.objective.show(*choice.scores[choice.best])
    where = (
        f"By cross-validation over {choice.classes} classes, {choice.folds} parts"
        if choice.folds
        else f"On {choice.tasks} validation tasks of {choice.classes} classes"
    )
    words = (
        f"{where}, all numbers of shots together, the choice is "
        f"{shown_title(evaluation, choice.best)} with {best}{unit}, the simplest learner within "
        "one standard error of the best"
    )
    others = [
        f"{shown_title(evaluation, name)} {_by(evaluation, difference)}"
        for name, difference in choice.differences.items()
    ]
    better = evaluation.objective.better
    clear = [-better * each.mean > each.interval for each in choice.differences.values()]
    if others and all(clear):
        words = f"{words}, measurably better than every other"
    return f"{words}: {'; '.join(others)}." if others else f"{words}."


def _by(evaluation: Evaluation, difference: Score) -> str:
    """Say how far a learner is from the choice."""
    shown = evaluation.objective.show_difference(*difference)
    if abs(difference.mean) <= difference.interval:
        return f"is not measurably different ({shown})"
    better = evaluation.objective.better * difference.mean > 0
    return f"is {'better' if better else 'worse'} by {shown}"


def _elsewhere(evaluation: Evaluation, choice: Choice, dataset: str) -> str:
    """Say which learner is best on another domain, if it is not the chosen one."""
    better = evaluation.objective.better
    measured = evaluation.of(dataset)
    mean = {
        name: sum(each.score(name, HEADLINE_MODE).mean for each in measured) / len(measured)
        for name in choice.scores
    }
    best = max(mean, key=lambda name: better * mean[name])
    if best == choice.best:
        return ""
    return (
        f"On the test tasks of {dataset}, which is another domain, {shown_title(evaluation, best)} "
        "has the best mean."
    )


def _kinds(evaluation: Evaluation, choice: Choice) -> tuple[bool, bool]:
    """Say whether closed-form learners and learners of gradient steps were compared."""
    infos = {"trained": evaluation.checkpoint, **evaluation.beside}
    kinds = {infos[name].settings.closed_form if name in infos else True for name in choice.scores}
    return True in kinds, False in kinds


def _outputs(evaluation: Evaluation) -> int:
    """Return the largest number of classes that a learner of gradient steps takes."""
    infos = (evaluation.checkpoint, *evaluation.beside.values())
    return max(info.settings.ways for info in infos if not info.settings.closed_form)
