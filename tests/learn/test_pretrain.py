"""Pretraining: a step against a literal torch loop, its checkpoint, and resuming."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reptile import from_arrays
from reptile.data.dataset import PreparedData
from reptile.learn.checkpoint import load_checkpoint, save_checkpoint
from reptile.learn.episodic import EpisodicState
from reptile.learn.pretrain import training_batch
from reptile.learn.run import run_training
from reptile.learn.train import Progress, untrained
from reptile.models import named_parts, size
from reptile.settings import TrainSettings
from reptile.tasks import Purpose, random_stream


@pytest.fixture(scope="module")
def data() -> PreparedData:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40 * 8, 1, 8, 8), dtype=np.uint8)
    return from_arrays(pixels, np.repeat(np.arange(40), 8))


def settings_of(**changes: object) -> TrainSettings:
    values: dict[str, object] = {
        "algorithm": "pretrain",
        "model": {"name": "mlp", "hidden": (8,)},
        "ways": 3,
        "inner_batch": 6,
        "meta_batch": 2,
        "meta_iterations": 6,
        "checkpoint_every": 3,
        "validation_tasks": 2,
        "episode": {"learning_rate": 0.01, "learning_rate_final": 0.01},
        "device": "cpu",
        "engine": "eager",
    }
    return TrainSettings.model_validate(values | changes)


def test_it_is_an_ordinary_training_of_one_classifier(data: PreparedData) -> None:
    settings = settings_of()
    start, trained = untrained(settings, data), run_training(settings, data)
    classes = data.split("train")
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, len(classes.starts))
    )
    parts = named_parts(start.model.shapes, start.state.weights[: size(start.model)])
    with torch.no_grad():
        for own, value in zip(network[1].parameters(), parts.values(), strict=True):
            own.copy_(value)
        for own in network[3].parameters():
            own.zero_()
    adam = torch.optim.Adam(network.parameters(), lr=0.01)
    for iteration in range(6):
        rng = random_stream(settings.seed, Purpose.TRAIN, iteration)
        rows, labels = training_batch(rng, classes, 12)
        images = torch.from_numpy(np.asarray(data.images[rows])) / 255
        loss = F.cross_entropy(network(images), torch.from_numpy(labels))
        adam.zero_grad()
        loss.backward()
        adam.step()
    wanted = torch.cat([each.detach().flatten() for each in network.parameters()])
    body, numbers = size(start.model), wanted[size(start.model) :]
    found = trained.state.weights
    torch.testing.assert_close(found[:body], wanted[:body], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[-len(numbers) :], numbers, rtol=1e-4, atol=1e-6)


def test_a_batch_has_images_of_its_classes(data: PreparedData) -> None:
    classes = data.split("train")
    rows, labels = training_batch(np.random.default_rng(0), classes, 500)
    assert set(labels) == set(range(len(classes.starts)))
    first = classes.starts[labels]
    assert ((rows >= first) & (rows < first + classes.counts[labels])).all()


def test_resume_equals_never_having_stopped(data: PreparedData, tmp_path: Path) -> None:
    whole = run_training(settings_of(), data)

    def kill(progress: Progress) -> None:
        if progress.iteration == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(settings_of(), data, tmp_path / "cut", on_progress=kill)
    resumed = run_training(settings_of(), data, tmp_path / "cut", resume=True)
    assert isinstance(whole.state, EpisodicState)
    assert isinstance(resumed.state, EpisodicState)
    assert torch.equal(resumed.state.weights, whole.state.weights)
    assert torch.equal(resumed.state.second_moment, whole.state.second_moment)


def test_its_checkpoint_is_a_learner_by_the_nearest_prototype(
    data: PreparedData, tmp_path: Path
) -> None:
    trained = run_training(settings_of(), data)
    save_checkpoint(tmp_path / "checkpoint", trained)
    learner = load_checkpoint(tmp_path / "checkpoint").closed_form
    assert set(learner.params) == {*trained.model.shapes, *learner.head.shapes}
    support = torch.randn(4, 1, 8, 8)
    features = learner.features(support)
    classifier = learner.classifier(features, torch.tensor([0, 0, 1, 1]), 2)
    means = torch.stack([features[:2].mean(0), features[2:].mean(0)])
    nearest = torch.cdist(features, means).argmin(1)
    assert torch.equal(classifier.logits(features).argmax(1), nearest)
