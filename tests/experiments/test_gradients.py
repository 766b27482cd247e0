"""The gradient study: its outer steps are the combinations they are called, and it runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from patterns import draw_letters
from PIL import Image
from studies import run_study

from experiments import gradients
from experiments.gradients import Combination, combinations
from reptile.data.dataset import PreparedData
from reptile.learn.engines import make_engine
from reptile.learn.optimizer import fresh_state
from reptile.learn.reptile import MetaState, meta_step, step_size
from reptile.models import build_model, initialise, unflatten
from reptile.settings import TrainSettings
from reptile.tasks import training_tasks

BASE = TrainSettings.model_validate(
    {
        "model": {"name": "mlp", "hidden": [8]},
        "ways": 4,
        "train_shots": 5,
        "inner_steps": 4,
        "inner_batch": 5,
        "meta_batch": 1,
        "optimizer": {"name": "sgd", "learning_rate": 0.01},
    }
)


def inner_gradients(weights: torch.Tensor, data: PreparedData) -> list[torch.Tensor]:
    """g1 … g4 by autograd and plain SGD."""
    model = build_model(BASE.model, BASE.ways, data.image_shape)
    task = training_tasks(data.split("train"), BASE, 0)[0]
    found = []
    for batch in task.batches:
        start = weights.detach().requires_grad_()
        images = torch.from_numpy(data.images[task.support[batch]]).double() / 255
        logits = model.forward(unflatten(model, start), images)
        loss = F.cross_entropy(logits, torch.from_numpy(task.support_targets[batch]))
        found.append(torch.autograd.grad(loss, start)[0])
        weights = weights - 0.01 * found[-1]
    return found


@pytest.mark.parametrize("combination", combinations(4), ids=lambda c: c.label)
def test_an_outer_step_is_the_combination_that_it_is_called(
    combination: Combination, data: PreparedData
) -> None:
    settings = combination.settings(BASE)
    model = build_model(BASE.model, BASE.ways, data.image_shape)
    weights = initialise(model, 0).double()
    engine = make_engine("eager", model, BASE.optimizer, data.images, torch.device("cpu"))
    task = training_tasks(data.split("train"), settings, 0)[0]
    state = MetaState(weights, fresh_state(weights))
    moved = meta_step(engine, state, [task], settings, step_size(settings, 0)).state.weights
    g1, g2, g3, g4 = inner_gradients(weights, data)
    expected = {
        "g1": g1,
        "1/2 (g1 + g2)": (g1 + g2) / 2,
        "1/3 (g1 + g2 + g3)": (g1 + g2 + g3) / 3,
        "1/4 (g1 + g2 + g3 + g4)": (g1 + g2 + g3 + g4) / 4,
        "g2": g2,
        "g3": g3,
        "g4": g4,
    }[combination.label]
    torch.testing.assert_close(weights - moved, 4 * 0.01 * expected, rtol=1e-5, atol=1e-8)


def test_the_four_batches_share_no_image(data: PreparedData) -> None:
    batches = np.concatenate(training_tasks(data.split("train"), BASE, 0)[0].batches)
    assert sorted(batches) == list(range(20))


def test_the_study_runs_and_again_from_what_it_has_trained(tmp_path: Path) -> None:
    draw_letters(tmp_path / "letters")
    small = (
        "prepare.image_size=14 prepare.held_out=groups prepare.test=2 train.train_shots=4 "
        "prepare.images_per_class=6 prepare.rotations=false train.model.name=mlp "
        "train.inner_batch=5 train.checkpoint_every=2 train.validation_tasks=2 evaluate.tasks=4 "
        "evaluate.steps=2"
    )
    words = ["--data", str(tmp_path / "letters"), "--iterations", "4"]
    words += ["--output", str(tmp_path / "study")]
    words += [word for change in small.split() for word in ("-S", change)]
    results = []
    for _ in range(2):
        run_study(gradients.main, words)
        results.append(json.loads((tmp_path / "study/gradients.json").read_text()))
    assert results[0] == results[1]
    assert [row["gradients"] for row in results[0]["combinations"]] == [
        combination.label for combination in combinations(4)
    ]
    assert Image.open(tmp_path / "study/gradients.png").format == "PNG"
