"""The methods of one evaluation: which there are for a checkpoint, and running them on tasks.

Learners of gradient steps are adapted; every other method is a head on the features of a network,
or on the inputs themselves.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from reptile.data.dataset import ClassRange, PreparedData
from reptile.errors import InputError
from reptile.evaluate.adapting import (
    Count,
    FloatArray,
    GradientLearner,
    Predictions,
    engine_on,
    run,
)
from reptile.evaluate.baselines import train_jointly
from reptile.evaluate.choice import by_preference, interval_scale, mean_of_classes
from reptile.evaluate.features import Embedding, apply, embed, raw, rows_of, training_sample
from reptile.evaluate.folds import parts, trained_again
from reptile.evaluate.heads import (
    Head,
    closed_form,
    constant_zero,
    linear_probe,
    mean_target,
    prototype_steps,
    prototypes,
    ridge,
    variances,
)
from reptile.evaluate.metrics import Choice, IntervalScale, Score
from reptile.learn import heads as learnt
from reptile.learn.checkpoint import Checkpoint, CheckpointInfo
from reptile.learn.engines import choose_device
from reptile.learn.episodic import ClosedForm
from reptile.learn.step_sizes import untrained_start
from reptile.learn.unadapted import ALGORITHM_OF, frozen_features
from reptile.models import Network, Params, initialise
from reptile.objectives import CLASSIFICATION
from reptile.settings import BATCH_NORM_MODES, BatchNormMode, EvaluateSettings
from reptile.tasks import (
    FewShotProtocol,
    Purpose,
    Task,
    check_classes,
    held_out_task,
    random_stream,
)

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of ridge, in units of the features' mean square
DEFAULT_STRENGTH = 0.1  # where there are no validation tasks to choose on
STRENGTH_TASKS = 200  # validation tasks that choose it, at each number of shots
CHOICE_TASKS = 100  # further ones that compare learners, at each number of shots
INPUT = "input"  # in place of a network: the inputs themselves


class Row(NamedTuple):
    """A method without gradient steps through a network."""

    network: str
    head: Head | None  # None: ridge regression, its strength chosen on validation tasks
    variances: Head | None = None  # of the outputs, where the head has them

    @classmethod
    def of(cls, network: str, head: learnt.Head, params: Params) -> "Row":
        """Return the row of a head that networks are trained through."""
        spread = variances(head, params) if isinstance(head, learnt.BayesHead) else None
        return cls(network, closed_form(head, params), spread)


class Drawn(NamedTuple):
    """Tasks of one number of shots."""

    tasks: list[Task]
    ways: int
    shots: int


class Validated(NamedTuple):
    """Learners on validation tasks: means over each of C classes' queries, all shots alike."""

    tasks: int
    ways: int
    scores: dict[str, FloatArray]  # by learner, the simplest first, [C]
    errors: dict[str, FloatArray]  # of learners with variances: squared standardised errors, [C]

    @classmethod
    def together(cls, parts: "Sequence[Validated]") -> "Validated":
        """Join the folds of a cross-validation, which have different classes."""

        def join(name: str) -> dict[str, FloatArray]:
            each = [getattr(part, name) for part in parts]
            return {learner: np.concatenate([one[learner] for one in each]) for learner in each[0]}

        tasks = sum(part.tasks for part in parts)
        return cls(tasks, parts[0].ways, join("scores"), join("errors"))


class Comparison:
    """What is compared: learners of gradient steps, and rows on networks' features.

    Args:
        settings: the protocol.
        ways: classes of a task.
        checkpoint: what was trained.
        data: what it was trained on.
        beside: further checkpoints trained on it, by name.
        baselines: whether to have more than the trained learner and its untrained start.
    """

    def __init__(
        self,
        settings: EvaluateSettings,
        ways: int,
        checkpoint: Checkpoint,
        data: PreparedData,
        beside: Mapping[str, Checkpoint],
        *,
        baselines: bool,
    ) -> None:
        self.ways, self.objective = ways, checkpoint.info.objective
        self.adapted: dict[str, GradientLearner] = {}
        self.rows: dict[str, Row] = {}
        self._settings, self._data = settings, data
        self._checkpoints = {"trained": checkpoint, **beside}
        self.scales: dict[str, IntervalScale] = {}
        self._networks: dict[str, ClosedForm] = {}
        self._strengths: dict[tuple[str, int], float] = {}
        checkpoint = _on_device(checkpoint)
        before = "pretrained" if _is_pretrained(checkpoint.info) else "random"
        self._add("trained", checkpoint)
        for name, other in beside.items():
            self._add(name, _on_device(other))
        self._add_untrained(checkpoint, before)
        if baselines:
            self._add_baselines(checkpoint, before)
            self._choose_strengths()

    def _add(self, name: str, checkpoint: Checkpoint) -> None:
        if checkpoint.info.settings.closed_form:
            learner = checkpoint.closed_form
            self._networks[name] = learner
            self.rows[name] = Row.of(name, learner.head, learner.params)
        else:
            self.adapted[name] = GradientLearner(checkpoint, checkpoint.meta)

    def _add_untrained(self, checkpoint: Checkpoint, before: str) -> None:
        """Add the weights that training began with, learning a task as the trained learner does."""
        settings = checkpoint.info.settings
        weights = initialise(checkpoint.model, settings.seed).to(checkpoint.state.weights.device)
        if not settings.closed_form:
            state = untrained_start(settings, checkpoint.model, weights)
            self.adapted["random"] = GradientLearner(checkpoint, state)
        if not self._has_training_split:
            return  # batch norm's statistics for these weights cannot be measured
        self._networks[before] = frozen_features(checkpoint, weights, self._data)
        if settings.closed_form:
            head = checkpoint.closed_form.head
            self.rows["random"] = Row.of(before, head, head.initial)

    @property
    def _has_training_split(self) -> bool:
        return len(self._data.split("train").starts) > 0

    def _add_baselines(self, checkpoint: Checkpoint, before: str) -> None:
        settings, data = checkpoint.info.settings, self._data
        if not settings.closed_form:
            self._networks["trained"] = frozen_features(checkpoint, checkpoint.meta.weights, data)
        if self.objective is not CLASSIFICATION:
            if "random" in self.adapted:
                random = self.adapted["random"].start.weights
                joint = train_jointly(settings, engine_on(checkpoint, data), random, data)
                self.adapted["joint"] = GradientLearner(checkpoint, joint)
            self.rows |= {
                "ridge": Row("trained", None),
                f"{before}_ridge": Row(before, None),
                "input_ridge": Row(INPUT, None),
                "mean": Row(INPUT, mean_target),
                "zero": Row(INPUT, constant_zero),
            }
            return
        if settings.head != ALGORITHM_OF["prototypes"]:  # there it is the trained learner
            self.rows["prototypes"] = Row("trained", prototypes)
            self.rows[f"{before}_prototypes"] = Row(before, prototypes)
        if settings.head != ALGORITHM_OF["ridge"]:
            self.rows["ridge"] = Row("trained", None)
        self.rows |= {
            "linear_probe": Row("trained", linear_probe),
            f"{before}_ridge": Row(before, None),
            "nearest_mean": Row(INPUT, prototypes),
            "input_ridge": Row(INPUT, None),
        }
        if not settings.closed_form:
            self.rows["prototype_steps"] = Row("trained", prototype_steps(settings.optimizer))

    @property
    def learners(self) -> tuple[str, ...]:
        """The methods that a bundle can have, and the checkpoints beside; the simplest first.

        That is the one with the fewest trained numbers, then with the fewest meta-iterations; a
        checkpoint's features without adaptation come before the checkpoint.
        """

        def size(name: str) -> tuple[int, int]:
            checkpoint = self._checkpoints[name]
            return len(checkpoint.state.weights), checkpoint.info.settings.meta_iterations

        names = sorted(self._checkpoints, key=size)
        if self.objective is CLASSIFICATION:
            unadapted = [name for name in ("prototypes", "ridge") if name in self.rows]
            names[(place := names.index("trained")) : place] = unadapted
        return tuple(names)

    def draw(self, classes: ClassRange, shots: int) -> Drawn:
        """Draw the test tasks; what else is measured changes none of them."""
        numbers = range(self._settings.tasks)
        return self._draw(classes, shots, self.ways, Purpose.EVALUATE, numbers)

    def adapt(
        self,
        name: str,
        data: PreparedData,
        drawn: Drawn,
        path: Sequence[int] = (),
        modes: Sequence[BatchNormMode] = BATCH_NORM_MODES,
        count: Count = lambda tasks: None,
    ) -> Predictions:
        """Run a learner of gradient steps."""
        learner, steps = self.adapted[name], self._settings.steps
        engine = engine_on(learner.checkpoint, data)
        return run(learner, engine, drawn.tasks, drawn.ways, steps, path, modes, count)

    def embeddings(
        self, data: PreparedData, tasks: Sequence[Task], names: Sequence[str]
    ) -> dict[str, Embedding]:
        """Compute the features that these rows need of all inputs of these tasks, each once."""
        rows = rows_of(tasks)
        networks = sorted({self.rows[name].network for name in names})
        return {network: self._embed(network, data, rows) for network in networks}

    def outputs(self, name: str, embeddings: Mapping[str, Embedding], drawn: Drawn) -> FloatArray:
        """Return a row's outputs on the queries [T, Q, outputs]."""
        row = self.rows[name]
        head = row.head or ridge(self._strengths[name, drawn.shots])
        return apply(head, embeddings[row.network], drawn.tasks, drawn.ways, self.objective)

    def coverage(
        self, name: str, embeddings: Mapping[str, Embedding], drawn: Drawn, outputs: FloatArray
    ) -> FloatArray | None:
        """Return the share of each task's values [T] that lie in their 95 % intervals.

        The intervals have the scale that validation tasks gave the learner, if any. None for a row
        without variances.
        """
        errors = self._standardised(name, embeddings, drawn, outputs)
        if errors is None:
            return None
        scale = self.scales[name].scale if name in self.scales else 1.0
        inside = np.abs(errors) <= 1.96 * scale
        return np.asarray(inside.mean((-2, -1)))

    def _standardised(
        self, name: str, embeddings: Mapping[str, Embedding], drawn: Drawn, outputs: FloatArray
    ) -> FloatArray | None:
        """Return (value - output) / standard deviation [T, Q, outputs] of a row with variances."""
        row = self.rows[name]
        if row.variances is None:
            return None
        spread = apply(
            row.variances, embeddings[row.network], drawn.tasks, drawn.ways, self.objective
        )
        targets = np.stack([task.query_targets for task in drawn.tasks]).reshape(outputs.shape)
        return np.asarray((targets - outputs) / np.sqrt(spread))

    def strength(self, name: str, shots: int) -> float | None:
        """Return the strength of a row of ridge regression; None for other rows."""
        return self._strengths.get((name, shots))

    def scores(self, outputs: FloatArray, drawn: Drawn) -> FloatArray:
        """Return the score of each task [T]."""
        return self.objective.scores(
            outputs, np.stack([task.query_targets for task in drawn.tasks])
        )

    def choose(self, count: Count) -> Choice | None:
        """Choose between the learners, and the scale of each one's intervals, on validation tasks.

        These have chosen nothing else. All numbers of shots count alike, and batch norm is frozen,
        as in a bundle. With `folds`, every learner is trained again for each. None if the
        validation split cannot make the tasks, or has a single class.

        Raises:
            InputError: a fold cannot make the tasks.
        """
        found = self._cross_validate(count) if self._settings.folds else self._validate(count)
        if found is None or len(next(iter(found.scores.values()))) < 2:
            return None
        self.scales = {name: interval_scale(errors) for name, errors in found.errors.items()}
        compared = {name: self.objective.compared(each) for name, each in found.scores.items()}
        best, *_ = order = by_preference(compared, self.objective.better)
        return Choice(
            best=best,
            order=order,
            tasks=found.tasks,
            ways=found.ways,
            classes=len(compared[best]),
            folds=self._settings.folds,
            scores={name: Score.of(values).rounded() for name, values in found.scores.items()},
            differences={
                name: Score.of(values - compared[best]).rounded()
                for name, values in compared.items()
                if name != best
            },
        )

    def _cross_validate(self, count: Count) -> Validated:
        found = []
        for data in parts(self._data, self._settings.folds, self._settings.seed):
            trained, *beside = (
                (name, trained_again(each, data)) for name, each in self._checkpoints.items()
            )
            fold = Comparison(
                self._settings,
                self.ways,
                trained[1],
                data,
                dict(beside),
                baselines=self.objective is CLASSIFICATION,  # which may be chosen there
            )
            part = fold._validate(count)
            if part is None:
                raise InputError(
                    f"evaluate.folds = {self._settings.folds}: a part of the classes of "
                    f"{data.name} cannot make the tasks; lower it, or evaluate.queries"
                )
            found.append(part)
        return Validated.together(found)

    def _validate(self, count: Count) -> Validated | None:
        """Measure the learners on tasks of the validation split; None if it cannot make them."""
        scores: dict[str, list[FloatArray]] = {name: [] for name in self.learners}
        errors: dict[str, list[FloatArray]] = {}
        classes, tasks, ways = [], 0, self.ways
        closed = [name for name in scores if name in self.rows]
        starts = np.sort(self._data.split("validation").starts)
        for shots in self._shots:
            drawn = self._validation(shots, STRENGTH_TASKS, CHOICE_TASKS)
            if drawn is None:
                return None
            tasks, ways = tasks + len(drawn.tasks), drawn.ways
            queries = np.stack([task.query for task in drawn.tasks])
            classes.append(np.searchsorted(starts, queries, side="right"))
            embeddings = self.embeddings(self._data, drawn.tasks, closed)
            for name, each in scores.items():
                if name in self.adapted:
                    predictions = self.adapt(
                        name, self._data, drawn, modes=("frozen",), count=count
                    )
                    outputs = predictions.outputs["frozen"]
                else:
                    outputs = self.outputs(name, embeddings, drawn)
                    off = self._standardised(name, embeddings, drawn, outputs)
                    if off is not None:
                        errors.setdefault(name, []).append(np.square(off).mean(-1))
                targets = np.stack([task.query_targets for task in drawn.tasks])
                # Each query by itself: the objective's scores are means over the last axis but one.
                each.append(self.objective.scores(outputs[:, :, None], targets[:, :, None]))
        where = np.concatenate([each.ravel() for each in classes])

        def by_class(values: Mapping[str, list[FloatArray]]) -> dict[str, FloatArray]:
            return {
                name: mean_of_classes(np.concatenate([part.ravel() for part in found]), where)
                for name, found in values.items()
            }

        return Validated(tasks, ways, by_class(scores), by_class(errors))

    @property
    def choice_adaptations(self) -> int:
        """How many tasks `choose` adapts to."""
        folds = self._settings.folds
        if not folds and any(self._validation(shots, 0, 1) is None for shots in self._shots):
            return 0
        gradient = sum(name in self.adapted for name in self.learners)
        return gradient * CHOICE_TASKS * len(self._shots) * max(1, folds)

    @property
    def _shots(self) -> list[int]:
        return sorted(set(self._settings.shots))

    def _choose_strengths(self) -> None:
        """Choose the strength of each ridge regression on validation tasks, for each shots."""
        names = [name for name, row in self.rows.items() if row.head is None]
        sample = training_sample(self._data, self._settings.seed)
        units = {}
        for network in {self.rows[name].network for name in names}:
            features = self._embed(network, self._data, sample)(sample)
            units[network] = float(features.square().sum(-1).mean()) or 1.0
        for shots in self._shots:
            drawn = self._validation(shots, 0, STRENGTH_TASKS)
            embeddings = self.embeddings(self._data, drawn.tasks, names) if drawn else {}
            for name in names:
                unit = units[self.rows[name].network]
                best, chosen = -np.inf, DEFAULT_STRENGTH * unit
                for strength in (each * unit for each in STRENGTHS):
                    if drawn is None:
                        break
                    self._strengths[name, shots] = strength
                    outputs = self.outputs(name, embeddings, drawn)
                    score = self.objective.better * self.scores(outputs, drawn).mean()
                    if score > best:
                        best, chosen = score, strength
                self._strengths[name, shots] = chosen

    def _validation(self, shots: int, first: int, count: int) -> Drawn | None:
        """Draw tasks of the validation split, of as many classes as it has at most."""
        classes = self._data.split("validation")
        ways = min(self.ways, len(classes.starts))
        masks = all(isinstance(each.checkpoint.model, Network) for each in self.adapted.values())
        if ways < self.objective.least_ways or (ways < self.ways and not masks):
            return None
        try:
            check_classes(classes, ways, shots + self._settings.queries, "validation split")
        except InputError:
            return None
        numbers = range(first, first + count)
        return self._draw(classes, shots, ways, Purpose.CHOOSE, numbers)

    def _draw(
        self, classes: ClassRange, shots: int, ways: int, purpose: Purpose, numbers: range
    ) -> Drawn:
        protocol = FewShotProtocol.of(self._settings, ways, shots)
        streams = (random_stream(self._settings.seed, purpose, shots, i) for i in numbers)
        return Drawn([held_out_task(stream, classes, protocol) for stream in streams], ways, shots)

    def _embed(self, network: str, data: PreparedData, rows: np.ndarray) -> Embedding:
        if network == INPUT:
            return raw(data.images)
        return embed(self._networks[network], data.images, rows)


def _on_device(checkpoint: Checkpoint) -> Checkpoint:
    """Put a checkpoint on the device that it was trained for."""
    device = choose_device(checkpoint.info.settings.device)
    return checkpoint._replace(state=checkpoint.state.to(device))


def _is_pretrained(info: CheckpointInfo) -> bool:
    """Say whether training began with weights of another training."""
    return info.settings.model.weights != ""
