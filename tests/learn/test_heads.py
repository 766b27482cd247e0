"""Closed-form heads against the papers' formulas, written out literally in NumPy and float64."""

import math

import numpy as np
import pytest
import torch

from reptile.learn.heads import HEADS, one_hot

RNG = np.random.default_rng(0)
LABELS = np.array([2, 0, 1, 1, 2, 0, 0])
SUPPORT, QUERIES = RNG.normal(size=(7, 5)), RNG.normal(size=(4, 5))
STRENGTH, SCALE = 0.7, 3.0


def logits(name: str, **numbers: float) -> np.ndarray:
    params = {
        f"head.{key}": torch.tensor(value, dtype=torch.float64).log()
        for key, value in numbers.items()
    }
    support = torch.from_numpy(SUPPORT)
    labels = one_hot(torch.from_numpy(LABELS), 3, support)
    classifier = HEADS[name].fit(params, support, labels)
    return classifier.logits(torch.from_numpy(QUERIES)).numpy()


def test_prototypes_are_nearest_means_as_snell_et_al_write_them() -> None:
    means = np.stack([SUPPORT[label == LABELS].mean(0) for label in range(3)])
    distances = np.array([[np.square(query - mean).sum() for mean in means] for query in QUERIES])
    wanted = np.exp(-SCALE * distances) / np.exp(-SCALE * distances).sum(1, keepdims=True)
    got = torch.from_numpy(logits("protonet", scale=SCALE)).softmax(1).numpy()
    np.testing.assert_allclose(got, wanted, rtol=1e-12)


def test_ridge_is_r2d2_in_its_primal_form() -> None:
    support = np.hstack([SUPPORT, np.ones((7, 1))])
    queries = np.hstack([QUERIES, np.ones((4, 1))])
    gram = support.T @ support + STRENGTH * np.eye(6)  # R2D2 uses the dual form
    wanted = SCALE * queries @ np.linalg.inv(gram) @ support.T @ np.eye(3)[LABELS]
    np.testing.assert_allclose(logits("ridge", strength=STRENGTH, scale=SCALE), wanted, rtol=1e-10)


@pytest.mark.parametrize("name", HEADS)
def test_a_class_without_examples_does_not_disturb_the_others(name: str) -> None:
    head = HEADS[name]
    params = {key: torch.tensor(value).double() for key, value in head.initial.items()}
    support = torch.from_numpy(SUPPORT)
    labels = torch.from_numpy(LABELS)
    three = head.fit(params, support, one_hot(labels, 3, support))
    four = head.fit(params, support, one_hot(labels, 4, support))
    torch.testing.assert_close(four.weight[:3], three.weight)
    torch.testing.assert_close(four.bias[:3], three.bias)
    assert four.weight[3].abs().max() == 0


def test_the_learnt_numbers_start_where_the_docstrings_say() -> None:
    assert HEADS["protonet"].initial == {"head.scale": 0.0}
    assert HEADS["ridge"].initial == {"head.strength": 0.0, "head.scale": math.log(4)}
