"""The algorithms by name: where each starts, one meta-iteration, and how the curve is measured.

Reptile and first-order MAML are in `reptile`, training through a closed-form head in `episodic`.
"""

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor

from reptile.data.dataset import ClassRange, PreparedData
from reptile.errors import InputError
from reptile.learn.engines.base import Engine
from reptile.learn.episodic import (
    EpisodicState,
    closed_form,
    episodic_step,
    mean_accuracy,
    population_statistics,
)
from reptile.learn.heads import HEADS
from reptile.learn.optimizer import fresh_state
from reptile.learn.reptile import MetaState, meta_step, step_size
from reptile.learn.validate import mean_score
from reptile.objectives import CLASSIFICATION, Objective
from reptile.settings import TrainSettings
from reptile.tasks import Task, episodes, training_tasks

State = MetaState | EpisodicState
S = TypeVar("S", MetaState, EpisodicState)


class Algorithm(NamedTuple, Generic[S]):
    """One way to meta-train, as functions of its state."""

    start: Callable[[Tensor, TrainSettings], S]
    """From the network's weights [P]."""
    iterate: Callable[[Engine, S, ClassRange, TrainSettings, int], tuple[S, Tensor]]
    """One meta-iteration on the training classes; also the loss of each of its tasks [T]."""
    finish: Callable[[Engine, S, PreparedData, TrainSettings], S]
    """What a checkpoint needs besides; no part of training."""
    score: Callable[[Engine, S, Sequence[Task], Objective, TrainSettings], float]
    """The mean score on validation tasks, of a finished state."""
    settings: str
    """The settings to lower where the loss is no longer finite."""


def _gradient_start(weights: Tensor, settings: TrainSettings) -> MetaState:
    return MetaState(weights, fresh_state(weights))


def _gradient_iterate(
    engine: Engine,
    state: MetaState,
    classes: ClassRange,
    settings: TrainSettings,
    iteration: int,
) -> tuple[MetaState, Tensor]:
    tasks = training_tasks(classes, settings, iteration)
    state, losses = meta_step(engine, state, tasks, settings, step_size(settings, iteration))
    return state, losses[:, -1]


def _gradient_finish(
    engine: Engine, state: MetaState, data: PreparedData, settings: TrainSettings
) -> MetaState:
    return state


def _gradient_score(
    engine: Engine,
    state: MetaState,
    tasks: Sequence[Task],
    objective: Objective,
    settings: TrainSettings,
) -> float:
    return mean_score(engine, state, tasks, objective)


def _episodic_start(weights: Tensor, settings: TrainSettings) -> EpisodicState:
    return EpisodicState.start(weights, HEADS[settings.algorithm])


def _episodic_iterate(
    engine: Engine,
    state: EpisodicState,
    classes: ClassRange,
    settings: TrainSettings,
    iteration: int,
) -> tuple[EpisodicState, Tensor]:
    episode, done = settings.episode, iteration / settings.meta_iterations
    rate = episode.learning_rate * (1 - done) + episode.learning_rate_final * done
    drawn = episodes(classes, settings, iteration)
    return episodic_step(engine, state, drawn, HEADS[settings.algorithm], rate)


def _episodic_finish(
    engine: Engine, state: EpisodicState, data: PreparedData, settings: TrainSettings
) -> EpisodicState:
    statistics = population_statistics(
        engine.model, state.weights, data.images, data.split("train"), settings.seed
    )
    return state._replace(statistics=statistics)


def _episodic_score(
    engine: Engine,
    state: EpisodicState,
    tasks: Sequence[Task],
    objective: Objective,
    settings: TrainSettings,
) -> float:
    return mean_accuracy(closed_form(engine.model, state, settings), engine, tasks)


GRADIENT: Algorithm[MetaState] = Algorithm(
    _gradient_start,
    _gradient_iterate,
    _gradient_finish,
    _gradient_score,
    "train.optimizer.learning_rate (now {0.optimizer.learning_rate:g}) or train.meta_step "
    "(now {0.meta_step:g})",
)
EPISODIC: Algorithm[EpisodicState] = Algorithm(
    _episodic_start,
    _episodic_iterate,
    _episodic_finish,
    _episodic_score,
    "train.episode.learning_rate (now {0.episode.learning_rate:g})",
)


def algorithm_of(settings: TrainSettings) -> Algorithm[MetaState] | Algorithm[EpisodicState]:
    """Return the algorithm that the settings name."""
    return EPISODIC if settings.closed_form else GRADIENT


def check_objective(settings: TrainSettings, objective: Objective) -> None:
    """Refuse an algorithm that cannot learn such tasks.

    Raises:
        InputError: a closed-form head, whose classes are named, for values.
    """
    if settings.closed_form and objective is not CLASSIFICATION:
        raise InputError(
            f"train.algorithm = {settings.algorithm}: for classes; to predict values use reptile "
            "or fomaml"
        )
