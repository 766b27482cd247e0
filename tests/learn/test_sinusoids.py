"""The authors' sinusoid example: what meta-learning is for, on a regressor.

y = a·sin(x + φ), a in 0.1..5, φ in 0..2π, x in -5..5; the network sees ten points and answers for
fifty. Nichol et al., arXiv 1803.02999, and its published notebook.
"""

import numpy as np
import pytest
import torch

from reptile.learn.engines import EagerEngine, Engine
from reptile.learn.engines.native import NativeEngine
from reptile.learn.optimizer import fresh_state
from reptile.learn.reptile import MetaState, meta_step, step_size
from reptile.minibatches import mini_batches
from reptile.models import Model, build_model, initialise
from reptile.objectives import REGRESSION
from reptile.settings import ModelSettings, OptimizerSettings, TrainSettings
from reptile.tasks import Task

POINTS = np.linspace(-5, 5, 1000, dtype=np.float32).reshape(-1, 1, 1, 1)
SEEN, STEPS = 10, 32
ZERO = 4.25  # the mean squared error of always answering 0: E[a²] / 2
SETTINGS = TrainSettings(
    model=ModelSettings(name="mlp", hidden=(64, 64), activation="tanh"),
    optimizer=OptimizerSettings(name="sgd", learning_rate=0.02, state="parallel"),
    inner_steps=5,
    inner_batch=10,
    meta_batch=5,
    meta_iterations=3000,
    meta_step=1.0,
)
CPU = torch.device("cpu")


@pytest.fixture
def model() -> Model:
    return build_model(SETTINGS.model, 1, (1, 1, 1), REGRESSION)


def native(model: Model) -> Engine:
    return NativeEngine(model, SETTINGS.optimizer, POINTS)


def eager(model: Model) -> Engine:
    return EagerEngine(model, SETTINGS.optimizer, POINTS, CPU)


def sinusoid(seed: tuple[int, ...], *, test: bool) -> Task:
    """Fifty points of a new sinusoid: all to learn from, or ten of them to learn all from."""
    rng = np.random.default_rng(seed)
    amplitude, phase = rng.uniform(0.1, 5), rng.uniform(0, 2 * np.pi)
    rows = rng.choice(len(POINTS), 50, replace=False)
    values = amplitude * np.sin(POINTS[rows].ravel() + phase)
    if test:
        return Task(rows[:SEEN], values[:SEEN], rows, values, (np.arange(SEEN),) * STEPS)
    nothing = np.empty(0, dtype=np.int64)
    batches = mini_batches(rng, 50, SETTINGS.inner_batch, SETTINGS.inner_steps)
    return Task(rows, values, nothing, nothing, tuple(batches))


def learn(engine: Engine, weights: torch.Tensor, iterations: int) -> MetaState:
    state = MetaState(weights, fresh_state(weights))
    for iteration in range(iterations):
        tasks = [sinusoid((0, iteration, i), test=False) for i in range(SETTINGS.meta_batch)]
        state = meta_step(engine, state, tasks, SETTINGS, step_size(SETTINGS, iteration)).state
    return state


def error_on_new_sinusoids(engine: Engine, weights: torch.Tensor) -> float:
    """Return the mean squared error over all points of 100 new sinusoids, after adapting."""
    tasks = [sinusoid((1, i), test=True) for i in range(100)]
    adapted = engine.adapt(weights, fresh_state(weights), tasks).weights
    found = engine.predict(adapted, tasks, "transductive")[..., 0].numpy()
    return float(np.square(found - np.stack([task.query_targets for task in tasks])).mean())


@pytest.mark.usefixtures("kernel")
def test_reptile_learns_to_learn_sinusoids(model: Model) -> None:
    engine, start = native(model), initialise(model, 0)
    trained = learn(engine, start, SETTINGS.meta_iterations).weights
    error = error_on_new_sinusoids(engine, trained)
    assert error < ZERO / 5
    assert error < error_on_new_sinusoids(engine, start) / 4
    assert error_on_new_sinusoids(eager(model), trained) == pytest.approx(error, rel=1e-3)


@pytest.mark.usefixtures("kernel")
def test_native_and_eager_learn_the_same(model: Model) -> None:
    start = initialise(model, 0)
    here, there = (learn(make(model), start, 60).weights for make in (native, eager))
    assert (here - there).norm() < 1e-5 * (there - start).norm()
