"""Small tables: subjects of a few rows, of one input that is a number."""

import numpy as np
import torch
from torch import nn

import reptile
from reptile.data.arrays import Splits
from reptile.learn.heads import BayesHead

SPLITS: Splits = {"validation": 3, "test": 5}


def lines(subjects: int = 20, rows: int = 8) -> reptile.PreparedData:
    """Straight lines over time with noise; inputs of shape [1]."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (subjects, rows))
    y = rng.normal(2, 0.3, (subjects, 1)) * x + rng.normal(0, 1, (subjects, 1))
    names = np.repeat([f"s{number:02}" for number in range(subjects)], rows)
    y = y + rng.normal(0, 0.1, y.shape)
    return reptile.from_arrays(
        x.reshape(-1, 1).astype(np.float32), y.ravel(), tasks=names, splits=SPLITS
    )


class Time(nn.Module):
    """Features that are not trained: time itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 1.0


def test_the_fitted_prior_on_fixed_features_is_the_mixed_effects_model() -> None:
    """It finds what the lines were made with, and its intervals hold."""
    data = lines()
    episode = reptile.TrainSettings.model_validate(
        {
            "algorithm": "bayes",
            "ways": 1,
            "episode": {
                "shots": [3],
                "queries": 5,
                "fit_prior": True,
                "learning_rate": 0,
                "learning_rate_final": 0,
            },
            "meta_iterations": 1,
            "validation_tasks": 2,
        }
    )
    learner = reptile.train(data, episode, Time())
    assert not learner.weights
    metrics = learner.evaluate(data, reptile.EvaluateSettings(shots=(3,), queries=5, tasks=200))
    scores = metrics.scores["arrays"][3]
    trained, ridge = scores["trained"]["none"], scores["input_ridge"]["none"]
    assert trained.mean + trained.interval < ridge.mean
    assert 0.9 < metrics.coverage["arrays"][3]["trained"].mean < 0.99
    mean, root, noise = BayesHead.prior(learner.checkpoint.closed_form.params)
    np.testing.assert_allclose(noise, 0.01, rtol=0.4)
    deviations = (noise * (root @ root.T).diagonal()).sqrt()
    np.testing.assert_allclose(deviations, [0.3, 1.0], rtol=0.5)
    np.testing.assert_allclose(mean[:, 0], [2, 0], atol=0.6)


def test_reptile_learns_from_tables_of_few_rows() -> None:
    """Tasks of 8 rows: the learning curve is of half of them known, not of 10 and 10."""
    data = lines()
    settings = reptile.TrainSettings.model_validate(
        {
            "ways": 1,
            "model": {"name": "mlp", "hidden": [16], "activation": "tanh"},
            "engine": "eager",
            "train_shots": 8,
            "optimizer": {"name": "sgd", "learning_rate": 0.05},
            "inner_batch": 8,
            "meta_batch": 2,
            "meta_iterations": 60,
            "checkpoint_every": 30,
            "meta_step": 0.3,
            "validation_tasks": 20,
        }
    )
    learner = reptile.train(data, settings)
    first, last = (point.score for point in learner.info.curve)
    assert last < first
    metrics = learner.evaluate(data, reptile.EvaluateSettings(shots=(3,), queries=5, tasks=50))
    scores = metrics.scores["arrays"][3]
    assert scores["trained"]["frozen"].mean < scores["zero"]["none"].mean
