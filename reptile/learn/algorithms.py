"""The algorithms behind one interface: where each starts, a meta-iteration, its validation score.

Reptile and first-order MAML are in `reptile`, MAML and its variants in `maml`, training through a
closed-form head in `episodic`, ordinary supervised training in `pretrain`.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from reptile.data.dataset import ClassRange, PreparedData
from reptile.errors import InputError
from reptile.learn.engines.base import Engine
from reptile.learn.episodic import (
    ClosedForm,
    EpisodicState,
    episodic_step,
    mean_query_score,
    population_statistics,
    with_likely_prior,
)
from reptile.learn.heads import BayesHead, Head, head_of
from reptile.learn.maml import maml_step
from reptile.learn.optimizer import fresh_state
from reptile.learn.pretrain import classifier_shapes, pretrain_step, training_batch
from reptile.learn.reptile import MetaState, meta_step, step_size
from reptile.learn.shares import choose_shares, share_tasks
from reptile.learn.step_sizes import first_vector, relative_sizes, start_of
from reptile.learn.validate import mean_score
from reptile.models import Model, Statistics, Towers
from reptile.objectives import Objective
from reptile.settings import TrainSettings
from reptile.tasks import Purpose, Task, episodes, random_stream, training_tasks


class Algorithm(Protocol):
    """One way to meta-train; the state is what it learns, with its optimiser's."""

    settings: TrainSettings

    def start(self, weights: Tensor) -> Any:
        """Return the state from the network's weights [P]."""

    def iterate(
        self, engine: Engine, state: Any, classes: ClassRange, iteration: int
    ) -> tuple[Any, Tensor]:
        """Take a meta-iteration; return the state, and the loss of each of its tasks [T]."""

    def finish(self, engine: Engine, state: Any, data: PreparedData) -> Any:
        """Return the state with what a checkpoint needs besides; training does not use it."""

    def score(self, engine: Engine, state: Any, tasks: Sequence[Task]) -> float:
        """Return the mean score of a finished state on validation tasks."""

    def diverged(self) -> str:
        """Return the settings to lower where the loss is no longer finite."""


class GradientSteps:
    """Reptile and first-order MAML."""

    def __init__(self, settings: TrainSettings) -> None:
        self.settings = settings

    def start(self, weights: Tensor) -> MetaState:
        """Return the state from the network's weights [P]."""
        return MetaState(weights, fresh_state(weights))

    def iterate(
        self, engine: Engine, state: MetaState, classes: ClassRange, iteration: int
    ) -> tuple[MetaState, Tensor]:
        """Take a meta-step; return the state, and each task's loss [T] before its last step."""
        tasks = training_tasks(classes, self.settings, iteration)
        epsilon = step_size(self.settings, iteration)
        state, losses = meta_step(engine, state, tasks, self.settings, epsilon)
        return state, losses[:, -1]

    def finish(self, engine: Engine, state: MetaState, data: PreparedData) -> MetaState:
        """Return the state as it is: training keeps all a checkpoint needs."""
        return state

    def score(self, engine: Engine, state: MetaState, tasks: Sequence[Task]) -> float:
        """Return the mean score on validation tasks after the inner steps."""
        return mean_score(engine, state, tasks, engine.model.objective)

    def diverged(self) -> str:
        """Return the settings to lower where the loss is no longer finite."""
        return (
            f"train.optimizer.learning_rate (now {self.settings.optimizer.learning_rate:g}) or "
            f"train.meta_step (now {self.settings.meta_step:g})"
        )


class Maml:
    """MAML, Proto-MAML, ANIL and Meta-SGD."""

    def __init__(self, settings: TrainSettings, model: Model) -> None:
        self.settings, self.model = settings, model
        relative_sizes(
            settings, model, first_vector(settings, model, model.initialise(0))
        )  # refuses

    def start(self, weights: Tensor) -> EpisodicState:
        """Return the state from the network's weights [P]."""
        vector = first_vector(self.settings, self.model, weights)
        return EpisodicState(vector, torch.zeros_like(vector), torch.zeros_like(vector), 0)

    def iterate(
        self, engine: Engine, state: EpisodicState, classes: ClassRange, iteration: int
    ) -> tuple[EpisodicState, Tensor]:
        """Take a meta-iteration; return the state, and the loss of each of its tasks [T]."""
        tasks = episodes(classes, self.settings, iteration)
        rate, done = adam_rate(self.settings, iteration), iteration / self.settings.meta_iterations
        return maml_step(engine, state, tasks, self.settings, rate, done)

    def finish(self, engine: Engine, state: EpisodicState, data: PreparedData) -> EpisodicState:
        """Return the state as it is: training keeps all a checkpoint needs."""
        return state

    def score(self, engine: Engine, state: EpisodicState, tasks: Sequence[Task]) -> float:
        """Return the mean score of a finished state on validation tasks."""
        start = start_of(self.settings, engine.model, state.weights)
        return mean_score(engine, start, tasks, engine.model.objective)

    def diverged(self) -> str:
        """Return the settings to lower where the loss is no longer finite."""
        return (
            f"train.optimizer.learning_rate (now {self.settings.optimizer.learning_rate:g}) or "
            f"train.episode.learning_rate (now {self.settings.episode.learning_rate:g})"
        )


class ThroughHead:
    """Training through a closed-form head: protonet, ridge, bayes."""

    def __init__(self, settings: TrainSettings, head: Head) -> None:
        self.settings = settings
        self.head = head
        self._fixed: Statistics = ()

    def start(self, weights: Tensor) -> EpisodicState:
        """Return the state from the network's weights [P]."""
        return EpisodicState.start(weights, self.head)

    def iterate(
        self, engine: Engine, state: EpisodicState, classes: ClassRange, iteration: int
    ) -> tuple[EpisodicState, Tensor]:
        """Take a meta-iteration; return the state, and the loss of each of its tasks [T]."""
        drawn = episodes(classes, self.settings, iteration)
        rate = adam_rate(self.settings, iteration)
        if iteration == 0 and self.settings.episode.fit_prior and isinstance(self.head, BayesHead):
            state = with_likely_prior(engine, state, self.head, classes, self.settings.seed)
        if not self._fixed and not engine.model.shapes:
            # Nothing of the network is trained, so its statistics are those of the end.
            seed = self.settings.seed
            self._fixed = population_statistics(engine, state.weights, classes, seed)
        return episodic_step(engine, state, drawn, self.head, rate, self._fixed or None)

    def finish(self, engine: Engine, state: EpisodicState, data: PreparedData) -> EpisodicState:
        """Return the state with the statistics of batch norm, and the shares of towers."""
        statistics = population_statistics(
            engine, state.weights, data.split("train"), self.settings.seed
        )
        state = state._replace(statistics=statistics)
        if not isinstance(engine.model, Towers):
            return state
        tasks = share_tasks(self.settings, data, engine.model.objective)
        return state._replace(shares=choose_shares(engine, state, self.head, tasks))

    def score(self, engine: Engine, state: EpisodicState, tasks: Sequence[Task]) -> float:
        """Return the mean score of a finished state on validation tasks."""
        learner = ClosedForm.of(engine.model, self.head, state)
        return mean_query_score(learner, engine, tasks)

    def diverged(self) -> str:
        """Return the settings to lower where the loss is no longer finite."""
        return f"train.episode.learning_rate (now {self.settings.episode.learning_rate:g})"


class Pretrain(ThroughHead):
    """A classifier of all training classes; tasks are learnt by the nearest prototype."""

    def __init__(self, settings: TrainSettings, head: Head, features: int, classes: int) -> None:
        super().__init__(settings, head)
        self.classes = classes
        shapes = classifier_shapes(features, classes)
        self._numbers = sum(shape.numel() for shape in shapes.values())

    def start(self, weights: Tensor) -> EpisodicState:
        """Return the state from the network's weights [P], with a classifier of zeros."""
        state = super().start(weights)
        return state.each(lambda vector: torch.cat([vector, vector.new_zeros(self._numbers)]))

    def iterate(
        self, engine: Engine, state: EpisodicState, classes: ClassRange, iteration: int
    ) -> tuple[EpisodicState, Tensor]:
        """Take a meta-iteration; return the state, and the loss of each of its tasks [T]."""
        settings = self.settings
        rng = random_stream(settings.seed, Purpose.TRAIN, iteration)
        batch = training_batch(rng, classes, settings.meta_batch * settings.inner_batch)
        rate = adam_rate(settings, iteration)
        return pretrain_step(engine, state, *batch, self.classes, rate)


def adam_rate(settings: TrainSettings, iteration: int) -> float:
    """Return the outer step size of a meta-iteration (from 0), which falls linearly."""
    episode, done = settings.episode, iteration / settings.meta_iterations
    return episode.learning_rate * (1 - done) + episode.learning_rate_final * done


def algorithm_of(settings: TrainSettings, model: Model, values: int, classes: int = 0) -> Algorithm:
    """Return the algorithm that the settings name.

    Args:
        settings: of the training.
        model: the network.
        values: how many values there are to predict; 0 where classes are to be named.
        classes: of the training split, for `pretrain`.

    Raises:
        InputError: the network does not fit the algorithm.
    """
    if settings.interpolates:
        return GradientSteps(settings)
    if settings.second_order:
        return Maml(settings, model)
    head = head_of(settings.head, model.feature_size, values)
    if settings.algorithm == "pretrain":
        return Pretrain(settings, head, model.feature_size, classes)
    return ThroughHead(settings, head)


def check_objective(settings: TrainSettings, objective: Objective) -> None:
    """Refuse an algorithm that cannot learn such tasks.

    Raises:
        InputError: a head for classes where values are to be predicted, or the other way round.
    """
    heads = dict.fromkeys(("protonet", "proto-maml", "ridge"), "classification")
    heads["bayes"] = "regression"
    wanted = heads.get(settings.head, objective.name)
    if wanted != objective.name:
        use = "bayes" if objective.name == "regression" else "protonet or ridge"
        raise InputError(
            f"train.algorithm = {settings.algorithm}: for {wanted}, and the data is for "
            f"{objective.name}; use {use}, or reptile"
        )
