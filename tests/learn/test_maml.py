"""MAML, ANIL, Meta-SGD: gradients by finite differences and in closed form, checkpoints."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reptile import from_arrays
from reptile.data.dataset import PreparedData
from reptile.errors import InputError
from reptile.learn.checkpoint import load_checkpoint, save_checkpoint
from reptile.learn.engines import EagerEngine, make_engine
from reptile.learn.episodic import EpisodicState
from reptile.learn.maml import maml_step, query_loss
from reptile.learn.run import run_training
from reptile.learn.step_sizes import first_vector
from reptile.learn.train import Progress
from reptile.models import ModuleNetwork, build_model, initialise, size, unflatten
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


def gradient_of(weights: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
    """Return the gradient of `query_loss` [P]."""
    loss = query_loss(weights.requires_grad_(), *arguments, **options)
    return torch.autograd.grad(loss, weights)[0]


@pytest.mark.parametrize(
    "network", [ModelSettings(filters=6), ModelSettings(name="mlp", hidden=(8,), activation="tanh")]
)
def test_the_gradient_equals_finite_differences(network: ModelSettings, data: PreparedData) -> None:
    model = build_model(network, 3, data.image_shape)
    engine = EagerEngine(model, OptimizerSettings(), data.images, CPU)
    (task, _) = episodes(data.split("train"), settings_of(), 0)
    weights = initialise(model, 0).double()
    gradient = gradient_of(weights, engine, task, RATE)
    rng = np.random.default_rng(1)
    for index in rng.integers(0, len(weights), 10):
        step = torch.zeros_like(weights)
        step[index] = 1e-6
        up, down = (query_loss(weights + s * step, engine, task, RATE).item() for s in (1, -1))
        assert float(gradient[index]) == pytest.approx((up - down) / 2e-6, rel=2e-3, abs=1e-7)


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
    full = gradient_of(weights, engine, task, RATE)
    first = gradient_of(weights, engine, task, RATE, first_order=True)
    assert float(full) == pytest.approx(at_end * shrink**steps, rel=1e-6)
    assert float(first) == pytest.approx(at_end, rel=1e-6)  # the second derivatives left out


def test_metasgds_step_sizes_follow_finite_differences(data: PreparedData) -> None:
    model = build_model(ModelSettings(name="mlp", hidden=(8,), activation="tanh"), 3, (1, 8, 8))
    engine = EagerEngine(model, OptimizerSettings(), data.images, CPU)
    (task, _) = episodes(data.split("train"), settings_of(), 0)
    settings = settings_of(algorithm="meta-sgd")
    start = first_vector(settings, initialise(model, 0).double())
    state = EpisodicState(start, torch.zeros_like(start), torch.zeros_like(start), 0)

    def loss(vector: torch.Tensor) -> float:
        rates = RATE * vector[size(model) :]
        weights = vector[: size(model)].requires_grad_()
        return float(query_loss(weights, engine, task, rates))

    after, losses = maml_step(engine, state, [task], settings, 0.0)
    gradient = after.first_moment / 0.1  # Adam's, of its first step
    assert float(losses) == pytest.approx(loss(start))
    for index in np.random.default_rng(1).integers(size(model), len(start), 10):
        step = torch.zeros_like(start)
        step[index] = 1e-5
        slope = (loss(start + step) - loss(start - step)) / 2e-5
        assert float(gradient[index]) == pytest.approx(slope, rel=2e-3, abs=1e-9)


def test_anil_is_maml_with_a_fixed_body(data: PreparedData) -> None:
    """The inner loop on the features: the body counts in the outer gradient alone."""
    model = build_model(ModelSettings(name="mlp", hidden=(8,), activation="tanh"), 3, (1, 8, 8))
    engine = EagerEngine(model, OptimizerSettings(), data.images, CPU)
    (task, _) = episodes(data.split("train"), settings_of(), 0)
    weights = initialise(model, 0).double()
    state = EpisodicState(weights, torch.zeros_like(weights), torch.zeros_like(weights), 0)
    after, losses = maml_step(engine, state, [task], settings_of(algorithm="anil"), 0.0)

    leaves = {name: value.clone() for name, value in unflatten(model, weights).items()}
    for value in leaves.values():
        value.requires_grad_()
    images, targets = engine.images(task.support).double(), torch.from_numpy(task.support_targets)
    features = model.features(leaves, images)
    weight, bias = leaves["head.weight"], leaves["head.bias"]
    for batch in map(torch.from_numpy, task.batches):
        inner = F.cross_entropy(features[batch] @ weight.T + bias, targets[batch])
        steps = torch.autograd.grad(inner, (weight, bias), create_graph=True)
        weight, bias = weight - RATE * steps[0], bias - RATE * steps[1]
    queries = model.features(leaves, engine.images(task.query).double())
    loss = F.cross_entropy(queries @ weight.T + bias, torch.from_numpy(task.query_targets))
    wanted = torch.autograd.grad(loss, list(leaves.values()))
    assert float(losses) == pytest.approx(float(loss.detach()), rel=1e-12)
    flat = torch.cat([each.flatten() for each in wanted])
    torch.testing.assert_close(after.first_moment / 0.1, flat, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("done", [0.0, 0.5, 1.0])
def test_the_multi_step_loss_equals_a_literal_loop(done: float, data: PreparedData) -> None:
    model = build_model(ModelSettings(name="mlp", hidden=(8,), activation="tanh"), 3, (1, 8, 8))
    engine = EagerEngine(model, OptimizerSettings(), data.images, CPU)
    (task, _) = episodes(data.split("train"), settings_of(), 0)
    start = initialise(model, 0).double()
    state = EpisodicState(start, torch.zeros_like(start), torch.zeros_like(start), 0)
    settings = settings_of(episode={"queries": 2, "multi_step_loss": True})
    after, losses = maml_step(engine, state, [task], settings, 0.0, done)

    def loss(weights: torch.Tensor, rows: np.ndarray, targets: np.ndarray) -> torch.Tensor:
        outputs = model.forward(unflatten(model, weights), engine.images(rows).double())
        return F.cross_entropy(outputs, torch.from_numpy(targets))

    thirds = [1 / 3, 1 / 3, 1 / 3]
    shares = {0.0: thirds, 0.5: [1 / 6, 1 / 6, 2 / 3], 1.0: [0.0, 0.0, 1.0]}[done]
    leaf = start.clone().requires_grad_()
    weights, total = leaf, torch.zeros(())
    for batch, share in zip(task.batches, shares, strict=True):
        inner = loss(weights, task.support[batch], task.support_targets[batch])
        weights = weights - RATE * torch.autograd.grad(inner, weights, create_graph=True)[0]
        total = total + share * loss(weights, task.query, task.query_targets)
    assert float(losses) == pytest.approx(float(total.detach()), rel=1e-12)
    wanted = torch.autograd.grad(total, leaf)[0]
    torch.testing.assert_close(after.first_moment / 0.1, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("algorithm", ["maml", "anil", "meta-sgd"])
def test_resume_equals_never_having_stopped(
    algorithm: str, data: PreparedData, tmp_path: Path
) -> None:
    settings = settings_of(algorithm=algorithm)
    whole = run_training(settings, data, tmp_path / "whole")

    def kill(progress: Progress) -> None:
        if progress.iteration == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(settings, data, tmp_path / "cut", on_progress=kill)
    resumed = run_training(settings, data, tmp_path / "cut", resume=True)
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


def test_metasgds_checkpoint_has_its_step_sizes(data: PreparedData, tmp_path: Path) -> None:
    trained = run_training(settings_of(algorithm="meta-sgd"), data)
    save_checkpoint(tmp_path / "checkpoint", trained)
    start = load_checkpoint(tmp_path / "checkpoint").meta
    weights, sizes = trained.state.weights.chunk(2)
    assert torch.equal(start.weights, weights)
    assert torch.equal(start.inner.second_moment, sizes)
    assert 0 < float((sizes - 1).abs().max()) < 0.1


def test_anil_adapts_the_head_alone(data: PreparedData) -> None:
    trained = run_training(settings_of(algorithm="anil"), data)
    settings = trained.info.settings
    engine = make_engine("auto", trained.model, settings.optimizer, data.images, CPU)
    (task, _) = episodes(data.split("train"), settings, 0)
    adapted = unflatten(trained.model, engine.adapt(*trained.meta, [task]).weights[0])
    before = unflatten(trained.model, trained.meta.weights)
    changed = {name for name, value in adapted.items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"name": "adam"}}, "its inner loop is plain SGD"),
        ({"optimizer": {"name": "sgd", "weight_decay": 0.9}}, "maml has none; set it to 1"),
        ({"optimizer": {"name": "scaled_sgd"}}, "not for maml; use sgd"),
        ({"algorithm": "anil", "engine": "native"}, "one step size for all parameters"),
        ({"algorithm": "ridge", "episode": {"multi_step_loss": True}}, "not for ridge"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_of(**changes)


def test_anil_refuses_a_network_without_a_linear_head(data: PreparedData) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Tanh())
    with pytest.raises(InputError, match="does not end in an adapted linear layer"):
        run_training(settings_of(algorithm="anil"), data, module=module)
