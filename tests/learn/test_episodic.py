"""Training through a closed-form head: its gradient, its optimiser, resuming, both engines."""

from pathlib import Path

import numpy as np
import pytest
import torch

from reptile import from_arrays
from reptile.data.dataset import PreparedData
from reptile.errors import InputError, StoppedError
from reptile.learn.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from reptile.learn.engines import EagerEngine
from reptile.learn.episodic import (
    EpisodicState,
    adam,
    episode_losses,
    mean_query_score,
    population_statistics,
)
from reptile.learn.heads import HEADS
from reptile.learn.run import run_training
from reptile.learn.train import Progress
from reptile.models import build_model, initialise
from reptile.settings import OptimizerSettings, TrainSettings
from reptile.tasks import FewShotProtocol, Purpose, episodes, held_out_task, random_stream

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data() -> PreparedData:
    """Sixty classes that differ in three patterns, under the stronger noise of three others."""
    rng = np.random.default_rng(0)
    patterns = rng.normal(size=(6, 8 * 8))
    mixed = np.concatenate(
        [np.repeat(rng.normal(0, 8, (60, 1, 3)), 12, 1), rng.normal(0, 25, (60, 12, 3))], axis=-1
    )
    pixels = np.clip(128 + mixed @ patterns, 0, 255).astype(np.uint8)
    return from_arrays(pixels.reshape(-1, 1, 8, 8), np.repeat(np.arange(60), 12))


def settings_of(**changes: object) -> TrainSettings:
    values: dict[str, object] = {
        "algorithm": "ridge",
        "model": {"filters": 6},
        "ways": 4,
        "episode": {"shots": [1, 3], "queries": 2, "learning_rate": 0.003},
        "meta_batch": 2,
        "meta_iterations": 12,
        "checkpoint_every": 4,
        "validation_tasks": 3,
        "device": "cpu",
    }
    return TrainSettings.model_validate(values | changes)


@pytest.mark.parametrize("algorithm", HEADS)
def test_the_gradient_equals_finite_differences(algorithm: str, data: PreparedData) -> None:
    settings = settings_of(algorithm=algorithm)
    model = build_model(settings.model, 0, data.image_shape)
    engine = EagerEngine(model, OptimizerSettings(), data.images, CPU)
    (episode, _) = episodes(data.split("train"), settings, 0)
    head = HEADS[algorithm]
    state = EpisodicState.start(initialise(model, 0).double(), head)
    weights = state.weights.requires_grad_()
    (gradient,) = torch.autograd.grad(
        episode_losses(engine, weights, [episode], head).sum(), weights
    )
    rng = np.random.default_rng(1)
    for index in [*rng.integers(0, len(weights), 8), *range(-len(head.initial), 0)]:
        step = torch.zeros_like(weights)
        step[index] = 1e-6
        with torch.no_grad():
            up = episode_losses(engine, weights + step, [episode], head).sum()
            down = episode_losses(engine, weights - step, [episode], head).sum()
        assert float(gradient[index]) == pytest.approx(float(up - down) / 2e-6, rel=1e-4, abs=1e-8)


def test_the_optimiser_is_torchs_adam() -> None:
    rng = np.random.default_rng(2)
    start = torch.from_numpy(rng.normal(size=9))
    gradients = torch.from_numpy(rng.normal(size=(5, 9)))
    state = EpisodicState(start, torch.zeros(9), torch.zeros(9), 0)
    parameter = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.Adam([parameter], lr=0.01)
    for gradient in gradients:
        state = adam(state, gradient, 0.01)
        parameter.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(state.weights, parameter.detach())


@pytest.mark.parametrize("algorithm", HEADS)
def test_training_learns_to_tell_unseen_classes_apart(algorithm: str, data: PreparedData) -> None:
    settings = settings_of(algorithm=algorithm, meta_iterations=100, checkpoint_every=100)
    trained = run_training(settings, data)
    untrained = run_training(settings.model_copy(update={"meta_iterations": 1}), data)
    stream = random_stream(0, Purpose.EVALUATE)
    protocol = FewShotProtocol(ways=4, shots=1, queries=2, steps=0, batch=1)
    tasks = [held_out_task(stream, data.split("test"), protocol) for _ in range(60)]
    engine = EagerEngine(trained.model, OptimizerSettings(), data.images, CPU)
    before, after = (
        mean_query_score(checkpoint.closed_form, engine, tasks)
        for checkpoint in (untrained, trained)
    )
    assert after > before + 0.05


def test_resume_equals_never_having_stopped(data: PreparedData, tmp_path: Path) -> None:
    settings = settings_of()
    whole = run_training(settings, data, tmp_path / "whole")

    def kill(progress: Progress) -> None:
        if progress.iteration == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(settings, data, tmp_path / "cut", on_progress=kill)
    resumed = run_training(settings, data, tmp_path / "cut", resume=True)
    assert_equal(resumed, whole)


def test_a_checkpoint_left_by_a_signal_is_evaluated_like_any_other(
    data: PreparedData, tmp_path: Path
) -> None:
    settings = settings_of(meta_iterations=8)
    whole = run_training(settings, data)
    iterations: list[int] = []
    with pytest.raises(StoppedError):
        run_training(
            settings,
            data,
            tmp_path,
            on_progress=lambda progress: iterations.append(progress.iteration),
            stop=lambda: iterations[-1] == 6,
        )
    stopped = load_checkpoint(max(tmp_path.glob("*/iteration-*")))
    assert stopped.info.iteration == 6
    assert isinstance(stopped.state, EpisodicState)
    engine = EagerEngine(stopped.model, OptimizerSettings(), data.images, CPU)
    measured = population_statistics(engine, stopped.state.weights, data.split("train"), 0)
    for mine, theirs in zip(stopped.state.statistics, measured, strict=True):
        torch.testing.assert_close(mine, theirs)
    rows = np.arange(10, 14)
    together, alone = (
        stopped.closed_form.features(torch.from_numpy(data.images[some]).float() / 255)
        for some in (rows, rows[:1])
    )
    torch.testing.assert_close(together[:1], alone)  # an image's features are its own
    assert_equal(run_training(settings, data, tmp_path, resume=True), whole)


def test_a_checkpoint_survives_its_folder(data: PreparedData, tmp_path: Path) -> None:
    trained = run_training(settings_of(), data)
    save_checkpoint(tmp_path / "checkpoint", trained)
    read = load_checkpoint(tmp_path / "checkpoint")
    assert_equal(read, trained)
    with pytest.raises(InputError, match="learns tasks in closed form"):
        _ = read.meta


def assert_equal(one: Checkpoint, other: Checkpoint) -> None:
    assert isinstance(one.state, EpisodicState)
    assert isinstance(other.state, EpisodicState)
    for mine, theirs in zip(one.state[:3], other.state[:3], strict=True):
        assert torch.equal(torch.as_tensor(mine), torch.as_tensor(theirs))
    assert one.state.step == other.state.step
    assert len(one.state.statistics) == 4
    for layer, other_layer in zip(one.state.statistics, other.state.statistics, strict=True):
        assert torch.equal(layer.mean, other_layer.mean)
        assert torch.equal(layer.variance, other_layer.variance)
    assert one.info == other.info


def test_features_after_training_depend_on_one_image_alone(data: PreparedData) -> None:
    learner = run_training(settings_of(), data).closed_form
    images = torch.from_numpy(np.array(data.images[:9])).float() / 255
    alone = torch.cat([learner.features(image[None]) for image in images])
    torch.testing.assert_close(learner.features(images), alone)


def test_statistics_are_those_of_a_fixed_sample_of_the_training_split(data: PreparedData) -> None:
    settings = settings_of()
    model = build_model(settings.model, 0, data.image_shape)
    weights, classes = initialise(model, 0), data.split("train")
    engine = EagerEngine(model, settings.optimizer, data.images, torch.device("cpu"))
    one, again, other = (
        population_statistics(engine, weights, classes, seed)[0].mean for seed in (0, 0, 1)
    )
    assert torch.equal(one, again)
    assert classes.counts.sum() <= 512  # so the sample is the whole split
    rows = np.concatenate(
        [np.arange(a, a + n) for a, n in zip(classes.starts, classes.counts, strict=True)]
    )
    images = torch.from_numpy(np.array(data.images[rows])).float() / 255
    padded = torch.nn.functional.pad(images, (0, 1, 0, 1))
    first = torch.nn.functional.conv2d(padded, weights[: 6 * 9].view(6, 1, 3, 3), stride=2)
    torch.testing.assert_close(one, first.mean((0, 2, 3)))
    torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("kernel")
def test_native_training_follows_the_eager_one(data: PreparedData) -> None:
    changes = {"meta_iterations": 4, "checkpoint_every": 4}
    native, eager = (
        run_training(settings_of(engine=engine, **changes), data) for engine in ("native", "eager")
    )
    away = (native.state.weights - eager.state.weights).norm()
    start = EpisodicState.start(initialise(native.model, 0), HEADS["ridge"]).weights
    assert away < 0.01 * (eager.state.weights - start).norm()
    assert native.info.curve[-1].loss == pytest.approx(eager.info.curve[-1].loss, rel=1e-4)


def test_values_cannot_be_predicted_in_closed_form(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    points, values = rng.normal(size=(400, 1)), rng.normal(size=(400, 1))
    functions = from_arrays(
        points.astype(np.float32), values.astype(np.float32), tasks=np.repeat(np.arange(20), 20)
    )
    with pytest.raises(
        InputError, match="for classification, and the data is for regression; use bayes"
    ):
        run_training(settings_of(ways=1, model={"name": "mlp"}), functions)
