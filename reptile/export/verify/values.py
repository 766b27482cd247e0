"""Checks that a closed-form regressor's bundle computes what eager PyTorch does.

As `closed_form` checks classifiers. Wanted are values and variances of `BayesHead.fit` in float64,
which solves another system than the graphs.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reptile.bundle_format import GRAPHS
from reptile.data.dataset import PreparedData
from reptile.export import closed_form_reference as reference
from reptile.export.reference import Array, Tensors
from reptile.export.verify.closed_form import ClosedFormSubject, raw_rows
from reptile.export.verify.conformance import Check
from reptile.export.verify.running import (
    ROUNDING,
    SETTINGS,
    Sessions,
    compare_answers,
    conformance,
    golden,
    read_manifest,
    run_checks,
    runtime,
    setting,
)
from reptile.learn.checkpoint import Checkpoint
from reptile.learn.unadapted import with_measured_intervals
from reptile.objectives import REGRESSION
from reptile.settings import VerifySettings
from reptile.tasks import FewShotProtocol, Purpose, check_classes, held_out_task, random_stream

SUPPORT_SIZES = (1, 2, 5, 25, 100)
QUERIES = 16
TOLERANCE = 1e-4  # beyond rounding, of which eager float32 has as much but not the same
VARIANCE_TOLERANCE = 1e-3  # of a variance
EXACT = 1e-5  # between graphs
DISAGREE = 0.01  # of the values, relative to their norm
WEIGHTS = ("head.mean", "head.covariance")


def verify_bundle(
    settings: VerifySettings, bundle: Path, checkpoint: Checkpoint, data: PreparedData
) -> dict[str, Any]:
    """Run every check of a closed-form regressor; arguments, result and errors as in `bundle`."""
    queries = REGRESSION.validation.queries
    check_classes(data.split("test"), 1, settings.shots + queries, f"test split of {data.name}")
    manifest = read_manifest(bundle)
    checkpoint = with_measured_intervals(checkpoint, manifest.raw["metrics"])
    sessions = Sessions(bundle, manifest, data.index.coding)
    return run_checks(GROUPS, _Subject(settings, bundle, manifest, sessions, checkpoint, data))


class _Subject(ClosedFormSubject):
    def task(self, size: int, number: int = 0) -> tuple[Array, Array]:
        """Draw points of one function of the test split, some twice if it has too few."""
        classes = self.data.split("test")
        rng = random_stream(self.settings.seed, Purpose.VERIFY, size, number)
        chosen = rng.integers(len(classes.starts))
        places = np.resize(rng.permutation(classes.counts[chosen]), size)
        rows = classes.starts[chosen] + places
        assert self.data.targets is not None
        return np.asarray(self.data.images[rows]), np.asarray(self.data.targets[rows])

    def adapt(self, inputs: Array, values: Array) -> Tensors:
        return self.session("adapt")(_feeds(inputs, values))

    def queries(self) -> Array:
        return self.task(QUERIES, number=1)[0].astype(np.float32)

    def wanted(self, inputs: Array, values: Array) -> Tensors:
        """Return eager PyTorch's values and variances of `queries`, by float64's other way."""
        learner = self.learner()
        support, queries = (reference.embed(learner, each) for each in (inputs, self.queries()))
        posterior = learner.posterior(support, torch.from_numpy(values))
        mean, variance = posterior.predict(queries)
        return {"logits": mean.numpy(), "variance": variance.numpy()}

    def rounded(self, inputs: Array, values: Array) -> Tensors:
        """Return what eager float32 computes, as the graphs do."""
        learner = self.learner(torch.float32)
        adapted = reference.adapt(learner, inputs, values)
        return reference.predict(learner, adapted, self.queries())


def _feeds(inputs: Array, values: Array) -> Tensors:
    return {
        "support_images": inputs.astype(np.float32),
        "support_labels": values.astype(np.float32),
    }


def _error(actual: Array, wanted: Array) -> float:
    """Return the largest difference relative to the largest value."""
    if actual.shape != wanted.shape:
        return math.inf
    off = np.abs(actual.astype(np.float64) - wanted).max(initial=0)
    return float(off / max(1.0, np.abs(wanted).max(initial=0)))


def _ratio(actual: Array, wanted: Array) -> float:
    """Return the largest difference of a variance, relative to that variance."""
    if actual.shape != wanted.shape:
        return math.inf
    return float((np.abs(actual.astype(np.float64) - wanted) / wanted).max(initial=0))


MEASURES = {"logits": (_error, TOLERANCE), "variance": (_ratio, VARIANCE_TOLERANCE)}


def _adapt(subject: _Subject) -> Iterator[Check]:
    """Parity over support sizes and degenerate tasks, in every setting of ONNX Runtime.

    The measure is the queries' values and variances; both sides use their own features.
    """
    tasks = {f"{size} points": subject.task(size) for size in SUPPORT_SIZES}
    inputs, values = subject.task(10)
    tasks |= {
        "zeros": (inputs, np.zeros_like(values)),
        "equal points": (np.repeat(inputs[:1], 10, axis=0), np.repeat(values[:1], 10, axis=0)),
    }
    wanted = {name: subject.wanted(*task) for name, task in tasks.items()}
    rounded = {name: subject.rounded(*task) for name, task in tasks.items()}
    for optimised, threads in SETTINGS:
        adapt = subject.session("adapt", optimised, threads)
        predict = subject.session("predict_adapted", optimised, threads)
        outcomes: dict[str, list[tuple[float, float, str]]] = {key: [] for key in MEASURES}
        for name, task in tasks.items():
            actual = adapt(_feeds(*task))
            answers = predict({"images": subject.queries()} | _head(actual))
            for key, (measure, tolerance) in MEASURES.items():
                want = wanted[name][key]
                error = measure(answers[key], want) if actual["finite"] else math.inf
                limit = ROUNDING * measure(rounded[name][key], want) + tolerance
                outcomes[key].append((error, limit, name))
        for key, each in outcomes.items():
            # NaN is the worst of all.
            error, limit, name = max(each, key=lambda o: o[0] / o[1] if o[0] == o[0] else math.inf)
            what = {"logits": "values", "variance": "variances"}[key]
            where, detail = setting(optimised, threads), f"worst of {len(each)}: {name}"
            yield Check.at_most(
                f"adapted {what} equal eager PyTorch's, {where}", error, limit, detail
            )


def _head(adapted: Tensors) -> Tensors:
    return {name: adapted[name] for name in WEIGHTS}


def _graphs_agree(subject: _Subject) -> Iterator[Check]:
    """`embed`, `fit` and `few_shot` compute the parts and the whole of `adapt`."""
    inputs, values = subject.task(25)
    queries, feeds = subject.queries(), _feeds(inputs, values)
    wanted = reference.embed(subject.learner(), inputs).numpy()
    rounding = _error(reference.embed(subject.learner(torch.float32), inputs).numpy(), wanted)
    # Sums in another order differ by rounding, which the head amplifies.
    eager, single = subject.wanted(inputs, values), subject.rounded(inputs, values)
    allowed = {
        key: ROUNDING * measure(single[key], eager[key]) + EXACT
        for key, (measure, _) in MEASURES.items()
    }
    for optimised, threads in SETTINGS:
        where = setting(optimised, threads)
        run = {name: subject.session(name, optimised, threads) for name in GRAPHS["closed_form"]}
        features = run["embed"]({"images": feeds["support_images"]})["features"]
        error, limit = _error(features, wanted), ROUNDING * rounding + EXACT
        yield Check.at_most(f"embed equals eager PyTorch, {where}", error, limit)
        adapted = run["adapt"](feeds)
        halves = run["fit"]({"features": features, "support_labels": feeds["support_labels"]})
        answers = {
            "embed and fit": run["predict_adapted"]({"images": queries} | _head(halves)),
            "few_shot": run["few_shot"](feeds | {"query_images": queries}),
        }
        whole = run["predict_adapted"]({"images": queries} | _head(adapted))
        one = [run["predict_adapted"]({"images": q[None]} | _head(adapted)) for q in queries]
        answers["each query alone"] = {
            key: np.concatenate([each[key] for each in one]) for key in MEASURES
        }
        for name, found in answers.items():
            shares = [
                measure(found[key], whole[key]) / allowed[key]
                for key, (measure, _) in MEASURES.items()
            ]
            detail = "deviation as a share of rounding's"
            yield Check.at_most(f"{name}: equals adapt, {where}", max(shares), 1, detail)


def _adapt_depends(subject: _Subject) -> Iterator[Check]:
    """Outputs must depend on every input: none was traced into a constant."""
    inputs, values = subject.task(5)
    base = subject.adapt(inputs, values)
    same = []
    for name, changed, outputs in (
        ("support_images", subject.adapt(subject.task(5, number=2)[0], values), WEIGHTS),
        ("support_labels", subject.adapt(inputs, values + 1), WEIGHTS[:1]),
    ):
        error = min(_error(changed[output], base[output]) for output in outputs)
        if not error > 1e-3:
            same.append(f"{name} changes the result by {error:.2g} only")
    yield Check.none_of("adapt depends on every input", same)


def _adapt_guards(subject: _Subject) -> Iterator[Check]:
    """Bad input must not be reported as a success."""
    inputs, values = subject.task(5)
    problems = []
    for value in (np.nan, np.inf):
        spoilt = values.astype(np.float32)
        spoilt[0] = value
        if subject.adapt(inputs, spoilt)["finite"]:
            problems.append(f"finite is true although a value is {value}")
    if (bad := subject.session.bad_input) is not None:
        spoilt = inputs.astype(np.float32)
        spoilt[0] = bad
        if subject.adapt(spoilt, values)["finite"]:
            problems.append(f"finite is true although an input is {bad}")
    yield Check.none_of("adapt guards its inputs", problems)


def _score(subject: _Subject) -> Iterator[Check]:
    """Few-shot scores on the same tasks, ONNX against PyTorch."""
    settings, data = subject.settings, subject.data
    queries = REGRESSION.validation.queries
    protocol = FewShotProtocol(1, settings.shots, queries, steps=0, batch=1)
    session, learner = subject.session("few_shot"), subject.learner()

    def answers() -> Iterator[tuple[Array, Array, Array]]:
        for number in range(settings.tasks):
            stream = random_stream(settings.seed, Purpose.VERIFY, number)
            task = held_out_task(stream, data.split("test"), protocol)
            inputs, query = (np.asarray(data.images[rows]) for rows in (task.support, task.query))
            feeds = _feeds(inputs, task.support_targets)
            actual = session(feeds | {"query_images": query.astype(np.float32)})["logits"]
            support, asked = (reference.embed(learner, each) for each in (inputs, query))
            values = torch.from_numpy(task.support_targets)
            eager = learner.posterior(support, values).predict(asked)[0].numpy()
            yield actual, eager, task.query_targets

    yield from compare_answers(REGRESSION, answers(), DISAGREE)


GROUPS: tuple[Callable[[_Subject], Iterator[Check]], ...] = (
    conformance,
    _adapt,
    _graphs_agree,
    _adapt_depends,
    _adapt_guards,
    _score,
    golden,
    raw_rows,
    runtime,
)
