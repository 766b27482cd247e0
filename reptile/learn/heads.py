"""Closed-form heads: a predictor from a support set in one step, without gradients.

Those for classes give weights [W, D] and biases [W] for features [D], so that whatever is trained
through them is used in the same way: logits = features · weightᵀ + bias. The one for values gives
each prediction with its variance.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from reptile.models import Params

Solve = Callable[[Tensor, Tensor], Tensor]
"""From a symmetric positive definite matrix [S, S] and [S, W] to the solution [S, W]."""


class Classifier(NamedTuple):
    """A linear classifier of features."""

    weight: Tensor  # [W, D]
    bias: Tensor  # [W]

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits [N, W] of features [N, D]."""
        return F.linear(features, self.weight, self.bias)


class Head(ABC):
    """How a support set becomes a predictor."""

    initial: Mapping[str, Tensor]
    """Its learnt numbers by name, and where they start."""

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Names and shapes of the learnt numbers."""
        return {name: value.shape for name, value in self.initial.items()}

    @abstractmethod
    def loss(
        self,
        params: Params,
        support: Tensor,
        support_targets: Tensor,
        queries: Tensor,
        query_targets: Tensor,
    ) -> Tensor:
        """Return the mean loss [] of the queries of a task.

        Args:
            params: the head's learnt numbers.
            support: features [S, D].
            support_targets: one-hot labels [S, W], or values [S, outputs].
            queries: features [Q, D].
            query_targets: likewise, [Q, W] or [Q, outputs].
        """


class ClassifierHead(Head):
    """A head that gives a linear classifier."""

    @abstractmethod
    def fit(
        self,
        params: Params,
        features: Tensor,
        labels: Tensor,
        solve: Solve = torch.linalg.solve,
    ) -> Classifier:
        """Return the classifier of a support set.

        Args:
            params: the head's learnt numbers.
            features: of the support set, [S, D].
            labels: one-hot, [S, W], of the features' type.
            solve: solves the linear system, where there is one.
        """

    def loss(
        self,
        params: Params,
        support: Tensor,
        support_targets: Tensor,
        queries: Tensor,
        query_targets: Tensor,
    ) -> Tensor:
        """Return the mean cross-entropy [] of the queries' labels."""
        classifier = self.fit(params, support, support_targets)
        return F.cross_entropy(classifier.logits(queries), query_targets)


class PrototypeHead(ClassifierHead):
    """Nearest prototype: logits are -s·‖f - c‖², with the mean c of each class's features.

    Snell et al., Prototypical networks for few-shot learning (2017), where s = 1; here s is learnt.
    ‖f‖² is left out, as it is the same for every class. A class without examples has prototype 0.
    """

    def __init__(self) -> None:
        self.initial = {"head.scale": torch.zeros(())}  # log s

    def fit(
        self,
        params: Params,
        features: Tensor,
        labels: Tensor,
        solve: Solve = torch.linalg.solve,
    ) -> Classifier:
        """Return the classifier by squared distances to the classes' mean features."""
        prototypes = (labels.T @ features) / labels.sum(0).clamp(min=1)[:, None]
        scale = params["head.scale"].exp()
        return Classifier(2 * scale * prototypes, -scale * prototypes.square().sum(1))


class RidgeHead(ClassifierHead):
    """Ridge regression on the one-hot labels, in closed form.

    Bertinetto et al., Meta-learning with differentiable closed-form solvers (R2D2, 2019): with
    A = [features, 1], W = Aᵀ(AAᵀ + λI)⁻¹Y and logits α·A·W; λ and α are learnt. R2D2's further bias
    is left out, as it is the same for every class.
    """

    def __init__(self) -> None:
        self.initial = {  # log λ and log α
            "head.strength": torch.zeros(()),
            "head.scale": torch.tensor(4.0).log(),
        }

    def fit(
        self,
        params: Params,
        features: Tensor,
        labels: Tensor,
        solve: Solve = torch.linalg.solve,
    ) -> Classifier:
        """Return the classifier by ridge regression on one-hot labels, solved in its dual form."""
        strength = params["head.strength"].exp()
        identity = torch.eye(features.shape[0], dtype=features.dtype, device=features.device)
        kernel = features @ features.T + 1 + strength * identity  # 1: of the column of ones
        dual = params["head.scale"].exp() * solve(kernel, labels)
        return Classifier(dual.T @ features, dual.sum(0))


class Posterior(NamedTuple):
    """What a support set says of the weights of a Bayesian linear regression."""

    mean: Tensor  # [D + 1, outputs]; the last row is the constant's
    covariance: Tensor  # [D + 1, D + 1], in units of the noise's variance
    noise: Tensor  # [outputs], its variance

    def predict(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of the values, both [N, outputs], at features [N, D]."""
        features = with_constant(features.to(self.mean.dtype))
        spread = 1 + ((features @ self.covariance) * features).sum(-1)
        return features @ self.mean, spread[:, None] * self.noise


CORRECTIONS = 2
EM_ITERATIONS = 300
MIN_NOISE = 1e-6  # of values without any, variance that float32 can tell from 0


class Prior(NamedTuple):
    """What a Bayesian linear regression starts from, and a way to its posterior for float32.

    `BayesHead.fit` subtracts from the prior covariance, which is many times the posterior one. Here
    nothing is subtracted: with Ψ = ΦR, where the prior is N(0, I), the posterior covariance is
    S = (I + ΨᵀΨ)⁻¹, of size D + 1 for any number of examples and with eigenvalues in 0..1.
    """

    mean: Tensor  # K₀, [D + 1, outputs]
    root: Tensor  # R with Λ₀⁻¹ = RRᵀ, [D + 1, D + 1]
    noise: Tensor  # σ², [outputs]

    def given(self, features: Tensor, values: Tensor, solve: Solve) -> tuple[Tensor, Tensor]:
        """Return the posterior mean [D + 1, outputs] and S, of the type of the prior.

        Args:
            features: [S, D].
            values: [S, outputs].
            solve: of a system of size D + 1.
        """
        features = with_constant(features)
        white = features @ self.root  # Ψ, [S, D + 1]
        identity = torch.eye(self.root.shape[0], dtype=white.dtype, device=white.device)
        shrunk = solve(identity + white.T @ white, identity)
        off = values - features @ self.mean
        move = shrunk @ (white.T @ off)
        for _ in range(CORRECTIONS):  # of S's rounding, by what the mean leaves of the examples
            move = move + shrunk @ (white.T @ (off - white @ move) - move)
        return self.mean + self.root @ move, shrunk

    def predict(self, mean: Tensor, shrunk: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of the values, both [N, outputs], at features [N, D].

        Args:
            mean: of the posterior.
            shrunk: S.
            features: of the type of the prior.
        """
        features = with_constant(features)
        white = features @ self.root
        spread = 1 + ((white @ shrunk) * white).sum(-1)
        return features @ mean, spread[:, None] * self.noise


class BayesHead(Head):
    """Bayesian linear regression whose prior and noise are learnt with the features.

    Harrison et al., Meta-learning priors for efficient online Bayesian regression (ALPaCA, 2018):
    with the prior N(K₀, Λ₀⁻¹σ²) of the weights and Φ = [features, 1], the posterior has
    Λ = ΦᵀΦ + Λ₀ and mean Λ⁻¹(ΦᵀY + Λ₀K₀); the loss is the negative logarithm of the queries'
    predictive density. Computed in float64: in float32 training drifts apart.

    Args:
        features: D.
        outputs: values to predict.
    """

    def __init__(self, features: int, outputs: int) -> None:
        size = features + 1
        self.initial = {
            "head.mean": torch.zeros(size, outputs),
            # Λ₀ = LLᵀ; below the diagonal L, on it the logarithm of L's.
            "head.factor": -2 * torch.eye(size),
            "head.noise": torch.full((outputs,), -4.0),  # log σ²
        }

    def fit(
        self,
        params: Params,
        features: Tensor,
        values: Tensor,
        solve: Solve = torch.linalg.solve,
    ) -> Posterior:
        """Return the posterior, float64, given features [S, D] and values [S, outputs].

        It solves a system of the support set's size, I + ΦΛ₀⁻¹Φᵀ, whose eigenvalues are at least 1.
        """
        prior = self.prior(params)
        mean, covariance, noise = prior.mean, prior.root @ prior.root.T, prior.noise
        features, values = with_constant(features.to(mean.dtype)), values.to(mean.dtype)
        spread = covariance @ features.T  # [D + 1, S]
        identity = torch.eye(len(features), dtype=mean.dtype, device=mean.device)
        off = torch.cat([values - features @ mean, spread.T], dim=1)
        solved = spread @ solve(identity + features @ spread, off)
        mean_move, shrunk = torch.split(solved, [values.shape[1], len(mean)], dim=1)
        return Posterior(mean + mean_move, covariance - shrunk, noise)

    @staticmethod
    def most_likely(
        gram: Tensor,
        product: Tensor,
        square: Tensor,
        count: Tensor,
        iterations: int = EM_ITERATIONS,
    ) -> dict[str, Tensor]:
        """Return the prior and noise that make the tasks' values likely, by the ECME algorithm.

        EM, but for the mean, which maximises the likelihood itself: EM's would move too slowly
        where a task's rows say little of it (Liu and Rubin, The ECME algorithm, 1994).

        It starts from the same regression for all tasks, and a prior as wide as its error. With
        fixed features this is the mixed-effects model (Laird and Ware, Random-effects models for
        longitudinal data, 1982), whose fixed and random effects are the features.

        Args:
            gram: ΦᵀΦ of each task's rows, Φ = [features, 1], float64 [T, D + 1, D + 1].
            product: ΦᵀY, [T, D + 1, outputs].
            square: the sum of each value's squares, [T, outputs].
            count: of rows, [T].
            iterations: of ECME.
        """
        identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        whole, rows = gram.sum(0), count.sum()
        tiny = 1e-9 * whole.diagonal().mean()
        mean = torch.linalg.solve(whole + tiny * identity, product.sum(0))

        def error(weights: Tensor) -> Tensor:
            """Return the sum of the squared errors of each task's weights, [outputs]."""
            return (square + (weights * (gram @ weights - 2 * product)).sum(1)).sum(0)

        covariance = identity
        noise = (error(mean.expand_as(product)) / rows).clamp(min=MIN_NOISE)
        for _ in range(iterations):
            root = torch.linalg.cholesky(covariance)
            inner = torch.linalg.solve(identity + root.T @ gram @ root, root.T.expand_as(gram))
            spread = root @ inner  # the covariance of each task's weights, in units of the noise
            weights = mean + spread @ (product - gram @ mean)
            off = (weights - mean) / noise.sqrt()
            covariance = (spread + off @ off.mT / len(noise)).mean(0)
            noise = (error(weights) + noise * (spread * gram).sum()) / rows
            noise = noise.clamp(min=MIN_NOISE)
            known = torch.cat([gram, product], dim=-1)
            known = torch.linalg.solve(identity + gram @ covariance, known).sum(0)
            whole, moments = torch.split(known, [len(identity), len(noise)], dim=-1)
            mean = torch.linalg.solve(whole + tiny * identity, moments)
        factor = torch.linalg.cholesky(torch.linalg.inv(covariance))
        raw = factor.tril(-1) + torch.diag_embed(factor.diagonal().log())
        return {"head.mean": mean, "head.factor": raw, "head.noise": noise.log()}

    @staticmethod
    def prior(params: Params) -> "Prior":
        """Return what is known without any support set, float64."""
        raw = params["head.factor"].double()
        factor = raw.tril(-1) + torch.diag_embed(raw.diagonal().exp())
        identity = torch.eye(len(raw), dtype=raw.dtype, device=raw.device)
        root = torch.linalg.solve_triangular(factor, identity, upper=False)
        return Prior(params["head.mean"].double(), root.T, params["head.noise"].double().exp())

    def loss(
        self,
        params: Params,
        support: Tensor,
        support_targets: Tensor,
        queries: Tensor,
        query_targets: Tensor,
    ) -> Tensor:
        """Return the mean negative log-likelihood [] of the queries' values."""
        mean, variance = self.fit(params, support, support_targets).predict(queries)
        off = (query_targets.to(mean.dtype) - mean).square() / variance
        return (0.5 * (off + variance.log() + math.log(2 * math.pi))).mean().to(queries.dtype)


HEADS: dict[str, ClassifierHead] = {"protonet": PrototypeHead(), "ridge": RidgeHead()}
"""Classifiers by the name of the algorithm that trains through them."""


def head_of(algorithm: str, features: int, outputs: int) -> Head:
    """Return the head that an algorithm trains through.

    Args:
        algorithm: its name.
        features: D.
        outputs: values to predict; of no concern to a classifier.
    """
    return BayesHead(features, outputs) if algorithm == "bayes" else HEADS[algorithm]


def with_constant(features: Tensor) -> Tensor:
    """Return features [N, D] with a column of ones, [N, D + 1]."""
    return torch.cat([features, torch.ones_like(features[:, :1])], dim=1)


def one_hot(labels: Tensor, ways: int, like: Tensor) -> Tensor:
    """Return labels [S] as [S, ways], of the type of `like`."""
    return F.one_hot(labels, ways).to(like.dtype)
