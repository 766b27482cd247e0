"""Closed-form heads against the papers' formulas, written out literally in NumPy and float64."""

import numpy as np
import pytest
import torch

from reptile.learn.heads import HEADS, BayesHead, one_hot

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
    params = {key: value.double() for key, value in head.initial.items()}
    support = torch.from_numpy(SUPPORT)
    labels = torch.from_numpy(LABELS)
    three = head.fit(params, support, one_hot(labels, 3, support))
    four = head.fit(params, support, one_hot(labels, 4, support))
    torch.testing.assert_close(four.weight[:3], three.weight)
    torch.testing.assert_close(four.bias[:3], three.bias)
    assert four.weight[3].abs().max() == 0


def test_the_learnt_numbers_start_where_the_papers_do() -> None:
    assert HEADS["protonet"].initial["head.scale"].exp() == 1
    assert HEADS["ridge"].initial["head.strength"].exp() == 1


def bayes_params(rng: np.random.Generator) -> dict[str, torch.Tensor]:
    head = BayesHead(5, 2)
    return {
        name: value.double() + 0.3 * torch.from_numpy(rng.normal(size=value.shape))
        for name, value in head.initial.items()
    }


def test_the_posterior_is_alpacas_in_its_primal_form() -> None:
    params, values = bayes_params(RNG), RNG.normal(size=(7, 2))
    posterior = BayesHead(5, 2).fit(params, torch.from_numpy(SUPPORT), torch.from_numpy(values))
    factor = np.tril(params["head.factor"].numpy(), -1)
    factor += np.diag(np.exp(np.diag(params["head.factor"].numpy())))
    prior = factor @ factor.T
    inputs = np.hstack([SUPPORT, np.ones((7, 1))])
    precision = prior + inputs.T @ inputs
    mean = np.linalg.solve(precision, inputs.T @ values + prior @ params["head.mean"].numpy())
    np.testing.assert_allclose(posterior.mean, mean, rtol=1e-9)
    np.testing.assert_allclose(
        posterior.covariance, np.linalg.inv(precision), rtol=1e-8, atol=1e-12
    )
    got, variance = posterior.predict(torch.from_numpy(QUERIES))
    queries = np.hstack([QUERIES, np.ones((4, 1))])
    spread = 1 + np.einsum("nd,de,ne->n", queries, np.linalg.inv(precision), queries)
    np.testing.assert_allclose(got, queries @ mean, rtol=1e-9)
    noise = np.exp(params["head.noise"].numpy())
    np.testing.assert_allclose(variance, spread[:, None] * noise, rtol=1e-8)


def test_the_posterior_of_two_halves_is_that_of_the_whole() -> None:
    """What one half says is the prior of the other."""
    head, params = BayesHead(5, 2), bayes_params(RNG)
    support, values = torch.from_numpy(SUPPORT), torch.from_numpy(RNG.normal(size=(7, 2)))
    whole, half = head.fit(params, support, values), head.fit(params, support[:4], values[:4])
    factor = torch.linalg.cholesky(torch.linalg.inv(half.covariance))
    raw = factor.tril(-1) + torch.diag_embed(factor.diagonal().log())
    then = head.fit(params | {"head.mean": half.mean, "head.factor": raw}, support[4:], values[4:])
    torch.testing.assert_close(then.mean, whole.mean)
    torch.testing.assert_close(then.covariance, whole.covariance)


def test_the_loss_of_values_is_the_negative_log_density_of_a_normal_distribution() -> None:
    head, params = BayesHead(5, 2), bayes_params(RNG)
    support, queries = torch.from_numpy(SUPPORT), torch.from_numpy(QUERIES)
    values, wanted = (torch.from_numpy(RNG.normal(size=(n, 2))) for n in (7, 4))
    mean, variance = head.fit(params, support, values).predict(queries)
    density = torch.distributions.Normal(mean, variance.sqrt()).log_prob(wanted)
    loss = head.loss(params, support, values, queries, wanted)
    torch.testing.assert_close(loss, -density.mean())


def test_the_form_for_float32_is_the_same_posterior() -> None:
    """Against `BayesHead.fit`, which solves a system of the support set's size instead."""
    head, params = BayesHead(5, 2), bayes_params(RNG)
    prior = head.prior(params)
    features, values, queries = (
        torch.from_numpy(RNG.normal(size=size)) for size in ((7, 5), (7, 2), (4, 5))
    )
    wanted = head.fit(params, features, values).predict(queries)
    found = prior.predict(*prior.given(features, values, torch.linalg.solve), queries)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def subjects(count: int = 30) -> list[tuple[np.ndarray, np.ndarray]]:
    """Straight lines over time, each subject with a slope and an intercept of its own."""
    rng = np.random.default_rng(5)
    found = []
    for _ in range(count):
        times = rng.uniform(-1, 1, rng.integers(4, 9))
        x = np.c_[times, np.ones(len(times))]
        weights = [2, -1] + rng.normal(size=2) * [0.5, 1.0]
        found.append((x, x @ weights + rng.normal(0, 0.3, len(x))))
    return found


def likely(iterations: int) -> dict[str, torch.Tensor]:
    gram, product, square, count = (
        torch.from_numpy(np.stack([part(x, y) for x, y in subjects()]))
        for part in (
            lambda x, y: x.T @ x,
            lambda x, y: x.T @ y[:, None],
            lambda x, y: np.array([y @ y]),
            lambda x, y: np.float64(len(y)),
        )
    )
    return BayesHead.most_likely(gram, product, square, count, iterations)


def log_likelihood(params: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of all values, by the density of the multivariate normal distribution."""
    mean, root, noise = BayesHead.prior(params)
    total = torch.zeros((), dtype=torch.float64)
    for x, y in subjects():
        phi = torch.from_numpy(x) @ root
        covariance = noise * (torch.eye(len(y), dtype=torch.float64) + phi @ phi.T)
        normal = torch.distributions.MultivariateNormal(
            (torch.from_numpy(x) @ mean)[:, 0], covariance
        )
        total = total + normal.log_prob(torch.from_numpy(y))
    return total


def test_the_likely_prior_has_the_greatest_likelihood() -> None:
    params = {name: value.requires_grad_() for name, value in likely(2000).items()}
    value = log_likelihood(params)
    value.backward()
    for name, number in params.items():
        assert number.grad is not None
        assert number.grad.abs().max() < 1e-4, name
    mean, root, noise = BayesHead.prior(params)
    np.testing.assert_allclose(mean[:, 0].detach(), [2, -1], atol=0.4)
    assert 0.07 < noise.item() < 0.12  # 0.3 squared
    deviations = (noise * (root @ root.T).diagonal()).sqrt().tolist()
    assert 0.3 < deviations[0] < 0.8 < deviations[1] < 1.4


def test_each_iteration_of_em_makes_the_values_likelier() -> None:
    values = [log_likelihood(likely(iterations)).item() for iterations in (0, 1, 5, 60, 300)]
    assert values == sorted(values)
