"""Algorithms side by side: trained within the same budget, measured on the same test tasks.

A cell is one algorithm with one seed, in a folder of its own; a finished cell is not trained again,
an interrupted one resumes. No export.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, get_args

import numpy as np
from markupsafe import Markup
from pydantic import ValidationError

from reptile.cpus import available_cpus
from reptile.data.dataset import PreparedData, load_prepared
from reptile.errors import InputError
from reptile.evaluate.adapting import FloatArray
from reptile.evaluate.measure import evaluate
from reptile.evaluate.metrics import Score
from reptile.evaluate.report.charts import Line, axis, line_chart
from reptile.evaluate.report.page import score_axis, templates
from reptile.experiments.cells import Reported, Training, trained
from reptile.experiments.reproduce import over_seeds
from reptile.files import atomic_file, write_json
from reptile.learn.algorithms import algorithm_of, check_objective
from reptile.learn.checkpoint import CurvePoint, load_checkpoint
from reptile.learn.engines import choose_device, make_engine
from reptile.learn.train import untrained
from reptile.objectives import CLASSIFICATION, Objective, objective_of
from reptile.provenance import code_sha256, settings_sha256, versions
from reptile.settings import BatchNormMode, EvaluateSettings, Settings, TrainSettings, describe

VERSION = 1  # of result.json
ALGORITHMS: tuple[str, ...] = get_args(TrainSettings.model_fields["algorithm"].annotation)
MODES: tuple[BatchNormMode, ...] = ("frozen", "transductive")
TIMED_SECONDS = 3.0  # of meta-iterations, to find how many fit into a budget of time
POINTS = 10  # of a learning curve

_STEPS_OF_CLASSES = {
    "train": {
        "optimizer": {"name": "sgd", "learning_rate": 0.4, "state": "reset"},
        "inner_steps": 1,
        "meta_batch": 32,
    },
    "evaluate": {"steps": 3},
}
_STEPS_OF_VALUES = {
    "train": {
        "optimizer": {"name": "sgd", "learning_rate": 0.01, "state": "reset"},
        "inner_steps": 1,
        "meta_batch": 25,
    },
}
_HEAD_OF_CLASSES = {"train": {"meta_batch": 1, "episode": {"queries": 5}}}
PUBLISHED: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "classification": {
        "maml": _STEPS_OF_CLASSES,
        "proto-maml": {
            "train": {
                "optimizer": {"name": "sgd", "learning_rate": 0.005, "state": "reset"},
                "inner_steps": 6,
                "meta_batch": 1,
            },
            "evaluate": {"steps": 6},
        },
        "anil": _STEPS_OF_CLASSES,
        "meta-sgd": _STEPS_OF_CLASSES | {"evaluate": {"steps": 1}},
        "pretrain": {"train": {"meta_batch": 1, "inner_batch": 64}},
        "protonet": _HEAD_OF_CLASSES,
        "ridge": _HEAD_OF_CLASSES,
    },
    "regression": {
        "maml": _STEPS_OF_VALUES,
        "anil": _STEPS_OF_VALUES,
        "meta-sgd": _STEPS_OF_VALUES,
        "bayes": {"train": {"meta_batch": 64, "episode": {"queries": 20}}},
    },
}
"""By objective and algorithm: the settings of the paper that has it, where they are not those of
Reptile. MAML: Finn et al. (2017), appendices A.1 and A.2; ANIL and Meta-SGD as MAML. Proto-MAML:
the configuration for ImageNet of Triantafillou et al. (2020). ProtoNet: Snell et al. (2017). Ridge:
Bertinetto et al. (2019). Bayes: Harrison et al. (2018)."""
EPISODE_WAYS = 20  # of protonet and ridge in training, if there are so many classes


class Budget(NamedTuple):
    """What each training may take: one of the two."""

    seconds: float | None = None
    gradients: int | None = None

    @property
    def shown(self) -> str:
        """The budget for people."""
        if self.seconds is not None:
            return f"{self.seconds:g} s of training"
        return f"{self.gradients:,} gradient evaluations"


@dataclass(frozen=True)
class Cell:
    """One algorithm with one seed."""

    training: Training
    curve: tuple[CurvePoint, ...]
    scores: Mapping[int, Mapping[str, FloatArray]]
    """By shots and what batch norm sees (`none` where it does not matter): of each task [T]."""
    tasks_sha256: str
    """Of the rows of all test tasks; the same in every cell."""


@dataclass(frozen=True)
class Entry:
    """One algorithm with all its seeds."""

    algorithm: str
    settings: Settings  # `train.seed` is the first of the seeds
    cells: tuple[Cell, ...]

    @property
    def gradients(self) -> int:
        """Gradient evaluations of one training."""
        return self.settings.train.meta_iterations * gradients(self.settings.train)

    @property
    def seconds(self) -> float:
        """Seconds of one training, by the mean rate of the seeds."""
        return self.settings.train.meta_iterations / float(
            np.mean([_rate(self.settings.train, cell.training) for cell in self.cells])
        )


@dataclass(frozen=True)
class Comparison:
    """The result: algorithms in the order in which they were asked for."""

    budget: Budget
    ways: int
    data: PreparedData
    objective: Objective
    entries: tuple[Entry, ...]

    @property
    def modes(self) -> tuple[BatchNormMode, ...]:
        """The modes to show: where no prediction depends on a batch, both are the same."""
        return MODES if any("transductive" in _modes(each) for each in self.entries) else MODES[:1]

    @property
    def shots(self) -> tuple[int, ...]:
        """The numbers of shots, fewest first."""
        return tuple(self.entries[0].cells[0].scores)

    def score(self, entry: Entry, shots: int, mode: str) -> Score | None:
        """Return the score of an algorithm; None if it has none in this mode."""
        return _joint([_scores(cell, shots, mode) for cell in entry.cells])

    def difference(self, entry: Entry, shots: int) -> Score | None:
        """Return an algorithm's score less the first one's, task by task, each query alone."""
        pairs = zip(entry.cells, self.entries[0].cells, strict=True)
        pairs_of_scores = [
            (_scores(ours, shots, "frozen"), _scores(first, shots, "frozen"))
            for ours, first in pairs
        ]
        return _joint([ours - first for ours, first in pairs_of_scores])  # type: ignore[operator]


def compare(
    settings: Settings,
    algorithms: Sequence[str],
    seeds: int,
    budget: Budget,
    prepared: Path,
    folder: Path,
    *,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    on_progress: Reported = lambda what, done, total: None,
) -> Comparison:
    """Train and measure every algorithm with every seed; write `result.json`, `.md` and `.html`.

    With a budget of gradient evaluations the same seed gives the same weights. With one of seconds
    the meta-iterations that fit are found by timing some, once; after that they are fixed too.

    Args:
        settings: what all algorithms share: data, network, test tasks.
        algorithms: names, the first of which the others are compared with.
        seeds: how many, from `settings.train.seed` on.
        budget: of each training.
        prepared: the prepared data.
        folder: where everything goes: a folder for each algorithm, with one for each seed.
        changes: by algorithm, further changes of its settings, as in params.yaml.
        on_progress: called with the progress.

    Raises:
        InputError: an unknown algorithm or one that does not suit the data, a budget too small for
            one meta-iteration, or whatever the stages refuse; before anything is trained.
    """
    data = load_prepared(prepared)
    objective = objective_of(data.values)
    own = {
        name: settings_of(name, settings, data, (changes or {}).get(name, {}))
        for name in algorithms
    }
    ways = settings.evaluate.ways or (settings.train.ways if not data.values else 1)
    for each in own.values():
        check_objective(each.train, objective)
        untrained(each.train, data)
    planned = {
        name: _with_iterations(each, budget, data, folder / name) for name, each in own.items()
    }
    entries = []
    for name, each in planned.items():
        cells = []
        for number in range(seeds):
            seed = settings.train.seed + number
            training = each.train.model_copy(update={"seed": seed})
            label = f"{name}, seed {number + 1} of {seeds}"
            place = folder / name / f"seed-{seed}"
            cells.append(
                _cell(training, each.evaluate, ways, data, prepared, place, label, on_progress)
            )
        entries.append(Entry(name, each, tuple(cells)))
    result = Comparison(budget, ways, data, objective, tuple(entries))
    write_json(folder / "result.json", as_json(result))
    for suffix, text in (("md", markdown(result)), ("html", html(result))):
        with atomic_file(folder / f"result.{suffix}") as temporary:
            temporary.write_text(text, encoding="utf-8")
    return result


def settings_of(
    algorithm: str, settings: Settings, data: PreparedData, changes: Mapping[str, Any]
) -> Settings:
    """Return the settings of one algorithm: the shared ones, its paper's, and the user's changes.

    Raises:
        InputError: there is no such algorithm, or a setting is unknown or out of range.
    """
    if algorithm not in ALGORITHMS:
        raise InputError(f"{algorithm}: no such algorithm; there are {', '.join(ALGORITHMS)}")
    objective = objective_of(data.values)
    values: dict[str, Any] = settings.model_dump(mode="json")
    train, test = values["train"], values["evaluate"]
    train["algorithm"] = algorithm
    most = max(test["shots"])
    if algorithm in ("protonet", "ridge", "bayes"):
        classes = len(data.split("train").starts)
        train["ways"] = min(EPISODE_WAYS, classes) if objective is CLASSIFICATION else 1
        train["episode"]["shots"] = test["shots"] if not data.values else [*range(1, 2 * most + 1)]
    elif algorithm not in (
        "reptile",
        "fomaml",
        "pretrain",
    ):  # trained on tasks as they will be, all at once
        train["train_shots"] = min(test["shots"]) if objective is CLASSIFICATION else most
        train["inner_batch"] = train["ways"] * train["train_shots"]
        test["batch"] = train["ways"] * most
    for more in (PUBLISHED[objective.name].get(algorithm, {}), changes):
        _update(values, more)
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise InputError("\n".join(f"{algorithm}: {line}" for line in describe(error))) from None


def gradients(settings: TrainSettings) -> int:
    """Return the gradient evaluations of a meta-iteration, each of one example.

    A second derivative, as MAML's, counts as one more.
    """
    episode = settings.episode
    if settings.interpolates:
        each = settings.inner_steps * settings.inner_batch
    elif settings.algorithm == "pretrain":
        each = settings.inner_batch
    elif settings.closed_form:
        each = round(settings.ways * (float(np.mean(episode.shots)) + episode.queries))
    else:
        queries = settings.ways * episode.queries
        queries *= settings.inner_steps if episode.multi_step_loss else 1
        each = 2 * settings.inner_steps * settings.inner_batch + queries
        if settings.algorithm == "proto-maml":
            each += settings.ways * settings.train_shots  # for the prototypes
    return settings.meta_batch * each


def markdown(result: Comparison) -> str:
    """Return the table."""
    header, rows = _table(result)
    lines = [_row(header), _row(["---"] * len(header)), *map(_row, rows)]
    return "\n".join([*lines, "", *(f"- {note}" for note in _notes(result))]) + "\n"


def html(result: Comparison) -> str:
    """Return a page with the table and the learning curves."""
    header, rows = _table(result)
    return page(
        dataset=result.data.name,
        budget=result.budget.shown,
        header=header,
        rows=rows,
        notes=_notes(result),
        charts=[
            (f"{result.objective.title.capitalize()} on validation tasks, over {what}", chart)
            for what, chart in (
                ("gradient evaluations", _curves(result, over_time=False)),
                ("time", _curves(result, over_time=True)),
            )
        ],
    )


def page(**parts: Any) -> str:
    """Return a comparison's page: `dataset`, `budget`, `header`, `rows`, `notes` and `charts`."""
    return templates("reptile.experiments").get_template("compare.html").render(parts)


def as_json(result: Comparison) -> dict[str, Any]:
    """Return everything as plain values."""
    return {
        "version": VERSION,
        "budget": result.budget._asdict(),
        "objective": result.objective.name,
        "metric": result.objective.metric,
        "ways": result.ways,
        "data_sha256": result.data.content_sha256,
        "splits_sha256": result.data.splits_sha256,
        "tasks_sha256": result.entries[0].cells[0].tasks_sha256,
        "code_sha256": code_sha256("train", "evaluate"),
        "versions": versions("torch", "numpy"),
        "algorithms": [_entry(result, entry) for entry in result.entries],
    }


def _entry(result: Comparison, entry: Entry) -> dict[str, Any]:
    scores = {
        str(shots): {
            mode: asdict(score)
            for mode in result.modes
            if (score := result.score(entry, shots, mode)) is not None
        }
        for shots in result.shots
    }
    first = entry is result.entries[0]
    differences = {
        str(shots): asdict(score)
        for shots in result.shots
        if not first and (score := result.difference(entry, shots)) is not None
    }
    return {
        "algorithm": entry.algorithm,
        "settings": entry.settings.model_dump(mode="json", include={"train", "evaluate"}),
        "gradients": entry.gradients,
        "scores": scores,
        "differences": differences,
        "seeds": [
            {
                "training": cell.training.model_dump(mode="json"),
                "curve": [point.model_dump(mode="json") for point in cell.curve],
            }
            for cell in entry.cells
        ],
    }


def _with_iterations(
    settings: Settings, budget: Budget, data: PreparedData, folder: Path
) -> Settings:
    """Return the settings with as many meta-iterations as fit into the budget."""
    if budget.gradients is not None:
        number = budget.gradients // gradients(settings.train)
    else:
        assert budget.seconds is not None
        number = int(budget.seconds / _seconds_per_iteration(settings.train, data, folder))
    if number < 1:
        raise InputError(
            f"{settings.train.algorithm}: one meta-iteration takes more than {budget.shown}; "
            "raise the budget"
        )
    every = max(1, number // POINTS)
    train = {"meta_iterations": number, "checkpoint_every": every}
    return settings.model_copy(update={"train": settings.train.model_copy(update=train)})


def _seconds_per_iteration(settings: TrainSettings, data: PreparedData, folder: Path) -> float:
    """Time meta-iterations after a first one; what was found is kept in `folder/timing.json`."""
    identity = settings_sha256(
        settings.model_dump(mode="json", exclude={"meta_iterations", "checkpoint_every", "seed"})
        | {"data": data.content_sha256, "code": code_sha256("train"), "cpus": available_cpus()}
    )
    record = folder / "timing.json"
    if record.is_file():
        kept = json.loads(record.read_text(encoding="utf-8"))
        if kept["identity"] == identity:
            return float(kept["seconds_per_iteration"])
    model, state, info = untrained(settings, data)
    device = choose_device(settings.device)
    engine = make_engine(
        settings.engine, model, settings.optimizer, data.images, device, settings.precision
    )
    algorithm, state = algorithm_of(settings, model, info.values, info.classes), state.to(device)
    times: list[float] = []
    while sum(times[1:]) < TIMED_SECONDS:
        start = perf_counter()
        state, losses = algorithm.iterate(engine, state, data.split("train"), len(times))
        losses.sum().item()  # waits for a device
        times.append(perf_counter() - start)
    found = float(np.mean(times[1:]))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(record, {"identity": identity, "seconds_per_iteration": found})
    return found


def _cell(
    training: TrainSettings,
    test: EvaluateSettings,
    ways: int,
    data: PreparedData,
    prepared: Path,
    folder: Path,
    label: str,
    on_progress: Reported,
) -> Cell:
    how = trained(training, data, prepared, folder, f"{label}: training", on_progress)
    checkpoint = load_checkpoint(folder / "checkpoint")
    record = folder / "evaluation/scores.json"
    wanted = {"settings": test.model_dump(mode="json"), "ways": ways}
    wanted["code_sha256"] = code_sha256("evaluate")
    kept = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if {key: kept.get(key) for key in wanted} != wanted:
        evaluation = evaluate(
            test,
            checkpoint,
            data,
            {},
            lambda done, total: on_progress(f"{label}: evaluating", done, total),
            ways=ways,
            baselines=False,
        )
        digest = hashlib.sha256()
        scores: dict[str, dict[str, list[float]]] = {}
        for measured in evaluation.held_out:
            for task in measured.tasks:
                digest.update(task.support.tobytes() + task.query.tobytes())
            scores[str(measured.shots)] = {
                mode: values.tolist()
                for mode, values in measured.task_scores["trained"].items()
                if mode == "none" or (mode in MODES and mode in evaluation.modes)
            }
        kept = wanted | {"tasks_sha256": digest.hexdigest(), "scores": scores}
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, kept)
    return Cell(
        how,
        checkpoint.info.curve,
        {
            int(shots): {mode: np.array(values) for mode, values in by_mode.items()}
            for shots, by_mode in kept["scores"].items()
        },
        kept["tasks_sha256"],
    )


def _scores(cell: Cell, shots: int, mode: str) -> FloatArray | None:
    """Return the score of each task [T]; of a learner without modes only each query alone."""
    by_mode = cell.scores[shots]
    return by_mode["none"] if "none" in by_mode and mode == "frozen" else by_mode.get(mode)


def _modes(entry: Entry) -> set[str]:
    return {mode for by_mode in entry.cells[0].scores.values() for mode in by_mode}


def _joint(scores: Sequence[FloatArray | None]) -> Score | None:
    """Return the mean with its interval: over the tasks of one seed, or over several seeds."""
    found = [each for each in scores if each is not None]
    if not found:
        return None
    return Score.of(found[0]) if len(found) == 1 else over_seeds([float(x.mean()) for x in found])


def _rate(settings: TrainSettings, training: Training) -> float:
    return training.tasks_per_second / settings.meta_batch


def _table(result: Comparison) -> tuple[list[str], list[list[str]]]:
    show = result.objective.show
    first = result.entries[0].algorithm
    header = ["algorithm"]
    for shots in result.shots:
        header += [f"{shots}-shot" + ", transductive" * (mode != "frozen") for mode in result.modes]
        header += [f"less {first}"] if len(result.entries) > 1 else []
    header += ["meta-iterations", "gradients", "minutes", "tasks/s", "peak memory"]
    rows = []
    for entry in result.entries:
        row = [entry.algorithm]
        for shots in result.shots:
            found = [result.score(entry, shots, mode) for mode in result.modes]
            row += ["–" if score is None else show(*score) for score in found]
            if len(result.entries) > 1:
                apart = result.difference(entry, shots)
                itself = entry is result.entries[0] or apart is None
                row.append("–" if itself or apart is None else _signed(show, apart))
        peaks = [cell.training.peak_bytes for cell in entry.cells]
        rate = float(np.mean([cell.training.tasks_per_second for cell in entry.cells]))
        row += [
            f"{entry.settings.train.meta_iterations:,}",
            f"{entry.gradients:,}",
            f"{entry.seconds / 60:.1f}",
            f"{rate:,.0f}",
            "–" if None in peaks else f"{max(p for p in peaks if p) / 2**20:,.0f} MiB",
        ]
        rows.append(row)
    return header, rows


def _signed(show: Any, score: Score) -> str:
    return "+" * (score.mean > 0) + str(show(*score))


def _notes(result: Comparison) -> list[str]:
    test, cells = result.entries[0].settings.evaluate, result.entries[0].cells
    title, unit = result.objective.title, result.objective.unit
    unit = f"{title} in {unit}" if unit else title
    several = len(cells) > 1
    notes = [
        f"{unit[0].upper()}{unit[1:]}, {result.ways}-way, on the same {test.tasks:,} test tasks of "
        f"{result.data.name}; each training had {result.budget.shown}.",
        (
            f"± is Student's t interval of {len(cells)} seeds, differences paired by seed."
            if several
            else "± is 1.96·s/√n over the tasks, differences paired by task."
        ),
    ]
    if len(result.modes) > 1:
        notes.append(
            "Each query alone (batch norm frozen), or with all queries of a task in one batch "
            "(transductive); a closed-form learner predicts each query alone."
        )
    steps = {each.settings.evaluate.steps: each.algorithm for each in result.entries}
    notes.append(
        "Gradients: of one example each; a second derivative counts as one more. Minutes: of one "
        "training, with its validation."
    )
    if len(steps) > 1:
        told = [
            f"{each.algorithm} {each.settings.evaluate.steps}"
            for each in result.entries
            if not each.settings.train.closed_form
        ]
        notes.append(f"Steps at test time: {', '.join(told)}.")
    return notes


def _curves(result: Comparison, *, over_time: bool) -> Markup:
    """Draw the validation score of each algorithm's first seed over time or gradients."""
    scale = result.objective.scale
    lines, ends = [], []
    for number, entry in enumerate(result.entries):
        train, cell = entry.settings.train, entry.cells[0]
        minutes = 1 / (60 * _rate(train, cell.training))
        unit = minutes if over_time else gradients(train) / 1e6  # of a meta-iteration
        x = [unit * point.iteration for point in cell.curve]
        y = [scale * point.score for point in cell.curve]
        ends.append(x[-1])
        lines.append(Line(entry.algorithm, f"line-{number % 8}", x, y))
    title = "minutes of training" if over_time else "million gradient evaluations"
    high = max(max(line.y) for line in lines)
    y_axis = score_axis(result.objective, high)
    x_axis = axis(title, max(ends))
    return line_chart(f"validation {result.objective.title} over {title}", lines, x_axis, y_axis)


def _update(values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Put nested changes into nested values."""
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(values.get(key), dict):
            _update(values[key], value)
        else:
            values[key] = value


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
