"""metrics.json: every score of an evaluation, typed; the one description of that file.

Its JSON Schema, reptile/schemas/metrics.schema.json, is made from these classes.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reptile.errors import InputError
from reptile.evaluate.methods import in_order
from reptile.objectives import objective_named
from reptile.settings import BATCH_NORM_MODES, BatchNormMode, describe

METRICS_FILE = "metrics.json"
DIGITS = 5  # finer than any interval, coarser than rounding errors

Mode = BatchNormMode | Literal["none"]
"""What batch norm sees; `none` for a method that has no network."""
Shots = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Score:
    """A mean over tasks, and half the width of its 95 % interval."""

    mean: float
    interval: float

    @classmethod
    def of(cls, values: npt.NDArray[np.float64]) -> "Score":
        """Score one value a task, [T] with T >= 2: 1.96·s/√T, s with T - 1 in its denominator."""
        return cls(float(values.mean()), 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values)))

    def __iter__(self) -> Iterator[float]:
        yield from (self.mean, self.interval)

    def rounded(self) -> "Score":
        """Return it rounded as in files."""
        return Score(round(self.mean, DIGITS), round(self.interval, DIGITS))


ByMethod = dict[str, dict[Mode, Score]]
Scores = dict[str, dict[Shots, ByMethod]]
"""By dataset, shots, method and what batch norm sees."""


class Choice(BaseModel):
    """The learners compared on validation tasks, all numbers of shots alike, class by class."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    best: str
    """The choice: the simplest learner within one standard error of the best mean; it may be of a
    checkpoint beside. Before there were `classes`, the one with the best mean."""
    order: tuple[str, ...] = ()
    """All learners, each the choice among it and those after it."""
    tasks: Annotated[int, Field(ge=2)]
    ways: Annotated[int, Field(ge=1)]
    classes: Annotated[int, Field(ge=2)] | None = None
    """Of the tasks: what the intervals are over. None in older files, where they are over tasks."""
    folds: Annotated[int, Field(ge=0)] = 0
    """Of cross-validation; 0 where the validation split has decided."""
    scores: dict[str, Score]
    """The simplest learner first."""
    differences: dict[str, Score]
    """Of each other learner to the choice, class by class; of values, of the logarithms of their
    errors. Of scores before there were `classes`."""


class IntervalScale(BaseModel):
    """How much wider or narrower a learner's intervals are made; its predictions stay the same."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """What the standard deviations are multiplied by; 1 where there were too few classes."""
    classes: Annotated[int, Field(ge=1)]
    """Validation classes that it was measured on."""


class Metrics(BaseModel):
    """All scores of an evaluation.

    Methods are those of `reptile.evaluate.methods` and the checkpoints measured beside.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    format: Literal[2, 3] = 3
    """Format 2 had scores alone."""
    objective: Literal["classification", "regression"]
    metric: Literal["accuracy", "mean_squared_error"]
    ways: Annotated[int, Field(ge=1)]
    """Classes of a task; 1 for a regressor."""
    held_out: str
    """The training dataset; its scores are for held-out classes."""
    learner: str = "trained"
    """The method that a bundle is to learn tasks with."""
    beside: tuple[str, ...] = ()
    """Methods that are other checkpoints, trained on the same data."""
    chosen: Choice | None = None
    """Which learner validation tasks choose; none where there are no such tasks."""
    scores: Scores
    """By dataset, shots, method and what batch norm sees."""
    differences: Scores = {}
    """Of each method to `learner`, task by task: its score minus the learner's; by the mode of
    either."""
    strengths: dict[str, dict[Shots, float]] = {}
    """Of ridge regression, by method and shots: λ for the kernel of the features."""
    coverage: dict[str, dict[Shots, dict[str, Score]]] = {}
    """Of learners that give intervals, by dataset, shots and method: the share of values that lie
    in their 95 % intervals, which have the scale of `interval_scales`."""
    interval_scales: dict[str, IntervalScale] = {}
    """Of learners that give intervals, by method, as measured on validation tasks."""

    def find(self, dataset: str, shots: int, method: str, mode: Mode) -> Score | None:
        """Return a score, or None if it was not measured; a method without network has one."""
        modes = self.scores.get(dataset, {}).get(shots, {}).get(method, {})
        return modes.get(mode, modes.get("none"))

    def score(self, dataset: str, shots: int, method: str, mode: Mode) -> Score:
        """Return a score.

        Raises:
            InputError: it was not measured.
        """
        score = self.find(dataset, shots, method, mode)
        if score is None:
            raise InputError(f"{method}, {shots}-shot {mode} on {dataset} was not measured")
        return score

    def best_of(self, methods: Sequence[str]) -> str:
        """Return what validation tasks choose of these methods, the first where there were none."""
        if self.chosen is None:
            return methods[0]
        if self.chosen.order:
            return min(methods, key=self.chosen.order.index)
        better, scores = objective_named(self.objective).better, self.chosen.scores
        return max(methods, key=lambda method: better * scores[method].mean)

    @property
    def fewest_shots(self) -> int:
        """The smallest number of shots measured on the held-out classes."""
        return min(self.scores[self.held_out])

    @property
    def methods(self) -> tuple[str, ...]:
        """All methods, in the order in which they are shown."""
        return in_order(
            name for shots in self.scores.values() for methods in shots.values() for name in methods
        )

    @property
    def modes(self) -> tuple[BatchNormMode, ...]:
        """The modes to show: without batch norm all give the same."""
        return BATCH_NORM_MODES if self._batch_norm_matters() else ("frozen",)

    def _batch_norm_matters(self) -> bool:
        each = [m for s in self.scores.values() for methods in s.values() for m in methods.values()]
        return any(len(set(modes.values())) > 1 for modes in each)

    def __str__(self) -> str:
        """Return a line for each method and mode, with its score on each dataset and shots."""
        lines = []
        for method, mode, cells in self.table():
            where = "" if mode == "none" else f", {mode}"
            scores = [
                f"{dataset} {shots}-shot {cell}"
                for (dataset, shots), cell in zip(self.columns, cells, strict=True)
                if cell
            ]
            lines.append(f"{method}{where}: {', '.join(scores)}")
        return "\n".join(lines)

    @property
    def columns(self) -> tuple[tuple[str, int], ...]:
        """Each dataset and number of shots."""
        return tuple((dataset, n) for dataset, by_shots in self.scores.items() for n in by_shots)

    def table(self) -> Iterator[tuple[str, Mode, list[str]]]:
        """Yield a row for each method and mode: its scores for people, by `columns`.

        Modes that are all the same are one row, of mode `none`.
        """
        show = objective_named(self.objective).show
        for method in self.methods:
            found = [self.scores[dataset][shots].get(method, {}) for dataset, shots in self.columns]
            modes: list[Mode] = [
                mode for mode in self.modes if any(mode in scores for scores in found)
            ]
            for mode in modes or (["none"] if any(found) else []):
                cells = [scores.get(mode) for scores in found]
                shown = [show(*score) if score else "" for score in cells]
                yield method, mode if len(modes) > 1 else "none", shown

    def flat(self) -> dict[str, float]:
        """Return all numbers under names such as `glyphs/1-shot/trained/frozen/accuracy`."""
        flat: dict[str, float] = {}
        for dataset, shots, method, mode, score in self.rows():
            name = "/".join([dataset, f"{shots}-shot", method, *([mode] * (mode != "none"))])
            flat |= {f"{name}/{self.metric}": score.mean, f"{name}/interval": score.interval}
        return flat

    def rows(self) -> Iterator[tuple[str, int, str, Mode, Score]]:
        """Yield every score as (dataset, shots, method, mode, score)."""
        for dataset, by_shots in self.scores.items():
            for shots, methods in by_shots.items():
                for method, modes in methods.items():
                    for mode, score in modes.items():
                        yield dataset, shots, method, mode, score


def read_metrics(evaluation: Path) -> Metrics:
    """Read metrics.json of an evaluation folder.

    Raises:
        InputError: missing, or not such a file.
    """
    path = evaluation / METRICS_FILE
    values = read_json(path)
    if "format" not in values:
        raise InputError(f"{path}: of an earlier version; run `reptile evaluate` again")
    try:
        return Metrics.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{path}: {describe(error)[0]}; run `reptile evaluate` again") from None


def upgrade(values: Mapping[str, Any], ways: int, held_out: str) -> Metrics:
    """Read what format 1 held, as in the manifest of a bundle of format 1.

    Args:
        values: dataset, then `N-shot`, then batch norm's mode or the method without a network, to
            numbers whose names start with the method's.
        ways: classes of a task.
        held_out: the training dataset.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: not such values.
    """
    metric = "accuracy" if "accuracy" in json.dumps(values) else "mean_squared_error"
    scores: dict[str, dict[int, dict[str, dict[str, Score]]]] = {}
    for dataset, by_shots in values.items():
        for shots, entries in by_shots.items():
            methods = scores.setdefault(dataset, {}).setdefault(int(shots.split("-")[0]), {})
            for entry, numbers in entries.items():
                for name, mean in numbers.items():
                    if not name.endswith(metric):
                        continue
                    prefix = name.removesuffix(metric)
                    score = Score(mean, numbers[f"{prefix}interval"])
                    if entry in BATCH_NORM_MODES:
                        methods.setdefault(prefix.rstrip("_") or "trained", {})[entry] = score
                    else:
                        methods[entry] = {"none": score}
    return Metrics.model_validate(
        {
            "objective": "classification" if metric == "accuracy" else "regression",
            "metric": metric,
            "ways": ways,
            "held_out": held_out,
            "scores": scores,
        }
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of an evaluation folder that holds one JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; run `reptile evaluate` first") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); run `reptile evaluate` again") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: not a JSON object; run `reptile evaluate` again")
    return dict(values)
