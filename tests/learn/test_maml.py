"""MAML: its gradient against finite differences and in closed form, its checkpoint, resuming."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from reptile import from_arrays
from reptile.data.dataset import PreparedData
from reptile.errors import InputError
from reptile.learn.checkpoint import load_checkpoint, save_checkpoint
from reptile.learn.engines import EagerEngine
from reptile.learn.episodic import EpisodicState
from reptile.learn.maml import query_loss
from reptile.learn.run import run_training
from reptile.learn.train import Progress
from reptile.models import ModuleNetwork, build_model, initialise
from reptile.objectives import REGRESSION
from reptile.settings import ModelSettings, OptimizerSettings, TrainSettings
from reptile.tasks import Task, episodes

CPU = torch.device("cpu")
RATE = 0.05


@pytest.fixture(scope="module")
def data() -> PreparedData:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40 * 8, 1, 8, 8), dtype=np.uint8)
    return from_arrays(pixels, np.repeat(np.arange(40), 8))


def settings_of(**changes: object) -> TrainSettings:
    values: dict[str, object] = {
        "algorithm": "maml",
        "model": {"filters": 6},
        "ways": 3,
        "train_shots": 2,
        "inner_steps": 3,
        "inner_batch": 4,
        "optimizer": {"name": "sgd", "learning_rate": RATE},
        "episode": {"queries": 2},
        "meta_batch": 2,
        "meta_iterations": 6,
        "checkpoint_every": 3,
        "validation_tasks": 2,
        "device": "cpu",
    }
    return TrainSettings.model_validate(values | changes)


@pytest.mark.parametrize(
    "network", [ModelSettings(filters=6), ModelSettings(name="mlp", hidden=(8,), activation="tanh")]
)
def test_the_gradient_equals_finite_differences(network: ModelSettings, data: PreparedData) -> None:
    model = build_model(network, 3, data.image_shape)
    engine = EagerEngine(model, OptimizerSettings(), data.images, CPU)
    (task, _) = episodes(data.split("train"), settings_of(), 0)
    weights = initialise(model, 0).double()
    gradient = torch.func.grad(query_loss)(weights, engine, task, RATE)
    rng = np.random.default_rng(1)
    for index in rng.integers(0, len(weights), 10):
        step = torch.zeros_like(weights)
        step[index] = 1e-6
        up, down = (query_loss(weights + s * step, engine, task, RATE) for s in (1, -1))
        assert float(gradient[index]) == pytest.approx(float(up - down) / 2e-6, rel=2e-3, abs=1e-7)


class Slope(nn.Module):
    """y = w·x, whose squared error is a quadratic in w."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.3]]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def test_the_gradient_on_a_quadratic_is_its_closed_form() -> None:
    x = np.array([[1.0], [2.0], [-1.0], [0.5]], dtype=np.float32)
    y = np.array([[0.2], [1.0], [0.7], [2.0]], dtype=np.float32)
    model = ModuleNetwork(Slope(), (1,), 1, REGRESSION)
    engine = EagerEngine(model, OptimizerSettings(), x, CPU)
    support, query, steps = np.array([0, 1]), np.array([2, 3]), 3
    task = Task(support, y[support], query, y[query], (np.array([0, 1]),) * steps)
    a = float(np.square(x[support]).mean())  # the loss is a·w² - 2·b·w + c
    b = float((x[support] * y[support]).mean())
    shrink = 1 - 2 * RATE * a
    w = 0.3
    for _ in range(steps):
        w -= RATE * 2 * (a * w - b)
    qa, qb = float(np.square(x[query]).mean()), float((x[query] * y[query]).mean())
    at_end = 2 * (qa * w - qb)
    weights = torch.tensor([0.3], dtype=torch.float64)
    full = torch.func.grad(query_loss)(weights, engine, task, RATE)
    first = torch.func.grad(query_loss)(weights, engine, task, RATE, True)
    assert float(full) == pytest.approx(at_end * shrink**steps, rel=1e-6)
    assert float(first) == pytest.approx(at_end, rel=1e-6)  # the second derivatives left out


def test_resume_equals_never_having_stopped(data: PreparedData, tmp_path: Path) -> None:
    whole = run_training(settings_of(), data, tmp_path / "whole")

    def kill(progress: Progress) -> None:
        if progress.iteration == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(settings_of(), data, tmp_path / "cut", on_progress=kill)
    resumed = run_training(settings_of(), data, tmp_path / "cut", resume=True)
    assert isinstance(resumed.state, EpisodicState)
    assert isinstance(whole.state, EpisodicState)
    assert torch.equal(resumed.state.weights, whole.state.weights)
    assert torch.equal(resumed.state.second_moment, whole.state.second_moment)


def test_its_checkpoint_is_a_start_for_gradient_steps(data: PreparedData, tmp_path: Path) -> None:
    trained = run_training(settings_of(), data)
    save_checkpoint(tmp_path / "checkpoint", trained)
    read = load_checkpoint(tmp_path / "checkpoint")
    assert torch.equal(read.meta.weights, trained.state.weights)
    assert read.meta.inner.step == 0
    with pytest.raises(InputError, match="by gradient steps"):
        _ = read.closed_form


def test_an_inner_loop_with_adam_is_refused() -> None:
    with pytest.raises(ValueError, match="its inner loop is plain SGD"):
        settings_of(optimizer={"name": "adam"})
