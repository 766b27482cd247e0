"""MAML and its variants: gradients by finite differences and in closed form, checkpoints."""

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
from reptile.learn.engines.batched import BatchedEngine
from reptile.learn.episodic import EpisodicState
from reptile.learn.maml import maml_step, query_loss
from reptile.learn.run import run_training
from reptile.learn.step_sizes import first_vector, relative_sizes, start_of
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
    start = first_vector(settings, model, initialise(model, 0).double())
    state = EpisodicState(start, torch.zeros_like(start), torch.zeros_like(start), 0)

    def loss(vector: torch.Tensor) -> float:
        rates = RATE * vector[size(model) :]
        weights = vector[: size(model)].requires_grad_()
        return float(query_loss(weights, engine, task, rates).detach())

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


def nearest_prototype(model: Any, leaves: Any, engine: Any, task: Task) -> Any:
    """Return Proto-MAML's head as its paper has it: weight 2c and bias -c·c for each class."""
    images = engine.images(task.support).double()
    features = model.features(leaves, images)
    labels = torch.from_numpy(task.support_targets)
    centres = [features[labels == label].mean(0) for label in range(model.outputs)]
    weight = torch.stack([2 * centre for centre in centres])
    bias = torch.stack([-(centre @ centre) for centre in centres])
    return weight, bias


@pytest.mark.parametrize("layers", [False, True])
def test_proto_maml_and_sizes_of_layers_equal_a_literal_loop(
    layers: bool, data: PreparedData
) -> None:
    """The outer gradient goes through the prototypes, the steps and their sizes."""
    model = build_model(ModelSettings(filters=6), 3, (1, 8, 8))
    engine = EagerEngine(model, OptimizerSettings(), data.images, CPU)
    settings = settings_of(
        algorithm="proto-maml", episode={"queries": 2, "layer_step_sizes": layers}
    )
    (task, _) = episodes(data.split("train"), settings, 0)
    weights = initialise(model, 0).double()
    start = first_vector(settings, model, weights)
    sizes = torch.rand(len(model.shapes), 3, dtype=torch.float64) + 0.5
    if layers:
        start[size(model) :] = sizes.flatten()
    state = EpisodicState(start, torch.zeros_like(start), torch.zeros_like(start), 0)
    after, losses = maml_step(engine, state, [task], settings, 0.0)

    leaves = {name: value.clone() for name, value in unflatten(model, weights).items()}
    for value in leaves.values():
        value.requires_grad_()
    sizes = (sizes if layers else torch.ones_like(sizes)).requires_grad_()
    weight, bias = nearest_prototype(model, leaves, engine, task)
    # Copies: a step's gradient takes the body and the head for independent.
    params = {name: value.clone() for name, value in leaves.items()}
    params |= {"head.weight": weight, "head.bias": bias}
    for step, batch in enumerate(task.batches):
        images = engine.images(task.support[batch]).double()
        targets = torch.from_numpy(task.support_targets[batch])
        inner = F.cross_entropy(model.forward(params, images), targets)
        gradients = torch.autograd.grad(inner, list(params.values()), create_graph=True)
        params = {
            name: value - RATE * sizes[layer, step] * gradient
            for layer, ((name, value), gradient) in enumerate(
                zip(params.items(), gradients, strict=True)
            )
        }
    outputs = model.forward(params, engine.images(task.query).double())
    loss = F.cross_entropy(outputs, torch.from_numpy(task.query_targets))
    wanted = torch.autograd.grad(loss, [*leaves.values(), sizes], allow_unused=True)
    assert wanted[-3] is None and wanted[-2] is None  # the head's own weights do not count
    assert float(losses) == pytest.approx(float(loss.detach()), rel=1e-12)
    flat = [
        torch.zeros_like(leaf).flatten() if each is None else each.flatten()
        for leaf, each in zip([*leaves.values(), sizes], wanted, strict=True)
    ]
    found = after.first_moment / 0.1  # Adam's, of its first step
    torch.testing.assert_close(
        found, torch.cat(flat if layers else flat[:-1]), rtol=1e-8, atol=1e-12
    )


@pytest.mark.parametrize("kind", [EagerEngine, BatchedEngine])
def test_adapting_from_prototypes_equals_the_inner_loop_of_training(
    kind: Any, data: PreparedData
) -> None:
    """With sizes for three steps; the last of them serves the fourth."""
    settings = settings_of(algorithm="proto-maml", episode={"queries": 2, "layer_step_sizes": True})
    trained = run_training(settings, data)
    model, vector = trained.model, trained.state.weights.double()
    optimizer = trained.info.settings.optimizer
    tasks = episodes(data.split("test"), settings, 0)
    tasks = [task._replace(batches=(*task.batches, task.batches[0])) for task in tasks]
    engine = kind(model, optimizer, data.images, CPU)
    start = start_of(settings, model, vector)
    adapted = engine.adapt(*start.starts(engine, tasks), tasks)

    eager = EagerEngine(model, optimizer, data.images, CPU)
    rates = RATE * relative_sizes(settings, model, vector)[[0, 1, 2, 2]]
    for task, weights in zip(tasks, adapted.weights, strict=True):
        loss = query_loss(
            vector[: size(model)].requires_grad_(), eager, task, rates, prototypes=True
        )
        outputs = model.forward(unflatten(model, weights), eager.images(task.query).double())
        here = F.cross_entropy(outputs, torch.from_numpy(task.query_targets))
        assert float(loss) == pytest.approx(float(here), rel=1e-9)


def test_without_steps_proto_maml_is_the_nearest_prototype(data: PreparedData) -> None:
    """Also for tasks of fewer classes than the network has outputs."""
    settings = settings_of(algorithm="proto-maml")
    trained = run_training(settings, data)
    model = trained.model
    engine = make_engine("eager", model, settings.optimizer, data.images, CPU)
    (task, _) = episodes(data.split("test"), settings, 0)
    two = np.flatnonzero(task.support_targets < 2)
    fewer = task._replace(
        support=task.support[two], support_targets=task.support_targets[two], batches=()
    )
    (weights,), _ = trained.meta.starts(engine, [fewer])
    leaves = unflatten(model, trained.meta.weights)
    statistics = model.statistics(leaves, engine.images(fewer.support))
    found = model.forward(unflatten(model, weights), engine.images(task.query), statistics)
    support = model.features(leaves, engine.images(fewer.support))
    queries = model.features(leaves, engine.images(task.query), statistics)
    labels = torch.from_numpy(fewer.support_targets)
    centres = torch.stack([support[labels == label].mean(0) for label in (0, 1)])
    distances = torch.cdist(queries, centres).square()
    torch.testing.assert_close(
        found[:, :2].softmax(1), (-distances).softmax(1), rtol=1e-4, atol=1e-5
    )
    assert (found.softmax(1)[:, 2] == 0).all()


VARIANTS: dict[str, dict[str, object]] = {
    "maml": {},
    "anil": {"algorithm": "anil"},
    "meta-sgd": {"algorithm": "meta-sgd"},
    "proto-maml": {
        "algorithm": "proto-maml",
        "episode": {"queries": 2, "layer_step_sizes": True},
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_equals_never_having_stopped(
    variant: str, data: PreparedData, tmp_path: Path
) -> None:
    settings = settings_of(**VARIANTS[variant])
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


def test_a_checkpoint_has_the_step_sizes_of_its_layers(data: PreparedData, tmp_path: Path) -> None:
    trained = run_training(settings_of(**VARIANTS["proto-maml"]), data)
    save_checkpoint(tmp_path / "checkpoint", trained)
    read = load_checkpoint(tmp_path / "checkpoint")
    start, model = read.meta, read.model
    sizes = trained.state.weights[size(model) :].view(len(model.shapes), 3)
    assert 0 < float((sizes[:-2] - 1).abs().max()) < 0.1
    for step, factors in enumerate(start.inner.second_moment.view(3, -1)):
        for layer, part in enumerate(unflatten(model, factors).values()):
            assert (part == sizes[layer, step]).all()


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
        ({"optimizer": {"name": "scaled_sgd"}}, "all have the same size; use sgd"),
        ({"algorithm": "anil", "engine": "native"}, "one step size for all parameters"),
        ({"algorithm": "ridge", "episode": {"multi_step_loss": True}}, "not for ridge"),
        ({"algorithm": "anil", "episode": {"layer_step_sizes": True}}, "not for anil"),
        ({"engine": "native", "episode": {"layer_step_sizes": True}}, "maml here more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_of(**changes)


@pytest.mark.parametrize("algorithm", ["anil", "proto-maml"])
def test_a_network_without_a_linear_head_is_refused(algorithm: str, data: PreparedData) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Tanh())
    with pytest.raises(InputError, match="does not end in an adapted linear layer"):
        run_training(settings_of(algorithm=algorithm), data, module=module)
