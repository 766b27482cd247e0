"""Heads on the features of many tasks, against scikit-learn and loops written out."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import normalize

from reptile.evaluate.heads import (
    Shown,
    closed_form,
    constant_zero,
    linear_probe,
    mean_target,
    prototype_steps,
    prototypes,
    ridge,
)
from reptile.learn import heads
from reptile.settings import OptimizerSettings

TASKS, WAYS, SHOTS, QUERIES, SIZE = 4, 3, 2, 5, 7


def shown_of(support: np.ndarray, targets: np.ndarray, query: np.ndarray) -> Shown:
    features, given, asked = (torch.from_numpy(np.array(x)) for x in (support, targets, query))
    return Shown(features, given, asked)


@pytest.fixture
def labels() -> np.ndarray:
    return np.repeat(np.arange(WAYS), SHOTS)


@pytest.fixture
def shown(labels: np.ndarray) -> Shown:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(TASKS, WAYS, SIZE)) + 1
    support = centres[:, labels] + rng.normal(size=(TASKS, WAYS * SHOTS, SIZE))
    query = centres[:, rng.integers(0, WAYS, QUERIES)] + rng.normal(size=(TASKS, QUERIES, SIZE))
    targets = np.broadcast_to(np.eye(WAYS)[labels], (TASKS, WAYS * SHOTS, WAYS))
    batches = tuple(
        torch.from_numpy(np.stack([rng.permutation(WAYS * SHOTS)[:4] for _ in range(TASKS)]))
        for _ in range(6)
    )
    return shown_of(support, targets, query)._replace(batches=batches)


def test_prototypes_are_scikit_learns_nearest_centroids(shown: Shown, labels: np.ndarray) -> None:
    answers = prototypes(shown).argmax(-1).numpy()
    for number in range(TASKS):
        oracle = NearestCentroid().fit(shown.support[number], labels)
        np.testing.assert_array_equal(answers[number], oracle.predict(shown.query[number]))


@pytest.mark.parametrize("strength", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("values", [False, True])
def test_ridge_is_scikit_learns(shown: Shown, strength: float, values: bool) -> None:
    if values:
        noise = torch.from_numpy(np.random.default_rng(1).normal(size=shown.targets.shape))
        shown = shown._replace(targets=noise)
    found = ridge(strength)(shown).numpy()
    for number in range(TASKS):
        support, query = (
            np.hstack([x[number].numpy(), np.ones((x.shape[1], 1))])
            for x in (shown.support, shown.query)
        )
        oracle = Ridge(alpha=strength, fit_intercept=False).fit(support, shown.targets[number])
        np.testing.assert_allclose(found[number], oracle.predict(query), atol=1e-5)


def test_a_linear_probe_is_scikit_learns_logistic_regression(
    shown: Shown, labels: np.ndarray
) -> None:
    found = linear_probe(shown).softmax(-1).numpy()
    for number in range(TASKS):
        oracle = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000)
        oracle.fit(normalize(shown.support[number].numpy()), labels)
        expected = oracle.predict_proba(normalize(shown.query[number].numpy()))
        np.testing.assert_allclose(found[number], expected, atol=1e-5)


def test_a_linear_probe_has_converged_at_100_images() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(20), 5)
    centres = rng.normal(size=(20, 64)) + 2
    support = centres[labels] + rng.normal(size=(100, 64))
    query = centres + rng.normal(size=(20, 64))
    shown = shown_of(support[None], np.eye(20)[labels][None], query[None])
    found = linear_probe(shown).softmax(-1)[0].numpy()
    oracle = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000)
    expected = oracle.fit(normalize(support), labels).predict_proba(normalize(query))
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_steps_from_the_prototypes_are_those_of_torchs_optimiser(
    shown: Shown, labels: np.ndarray, name: str
) -> None:
    settings = OptimizerSettings.model_validate({"name": name, "learning_rate": 0.05})
    found = prototype_steps(settings)(shown).numpy()
    moved = prototype_steps(settings)(shown._replace(batches=())).numpy()
    assert np.abs(found - moved).max() > 0.02
    for number in range(TASKS):
        length = np.sqrt(np.mean([float(f @ f) for f in shown.support[number]]))
        support, query = (x[number] / length for x in (shown.support, shown.query))
        means = torch.stack([support[labels == label].mean(0) for label in range(WAYS)])
        layer = torch.nn.Linear(SIZE, WAYS).double()
        layer.weight.data, layer.bias.data = 2 * means, -means.square().sum(1)
        optimiser: torch.optim.Optimizer = (
            torch.optim.Adam(layer.parameters(), lr=0.05, betas=(0.0, 0.999))
            if name == "adam"
            else torch.optim.SGD(layer.parameters(), lr=0.05)
        )
        for batch in shown.batches:
            rows = batch[number]
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(
                layer(support[rows]), torch.from_numpy(labels)[rows]
            ).backward()
            optimiser.step()
        np.testing.assert_allclose(found[number], layer(query).detach().numpy(), atol=1e-6)


@pytest.mark.parametrize("name", ["protonet", "ridge"])
def test_a_trained_head_answers_as_its_own_classifier_does(shown: Shown, name: str) -> None:
    head = heads.HEADS[name]
    params = {key: value.double() + 0.3 for key, value in head.initial.items()}
    found = closed_form(head, params)(shown)
    for number in range(TASKS):
        classifier = head.fit(params, shown.support[number], shown.targets[number])
        torch.testing.assert_close(found[number], classifier.logits(shown.query[number]))


def test_constant_predictors_know_no_query(shown: Shown) -> None:
    assert constant_zero(shown).abs().max() == 0
    mean = mean_target(shown)
    assert mean.shape == (TASKS, QUERIES, WAYS)
    torch.testing.assert_close(mean[:, 0], shown.targets.mean(1))
