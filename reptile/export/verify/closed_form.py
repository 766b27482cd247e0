"""Checks that a closed-form classifier's bundle computes what eager PyTorch does.

As `parity` checks learners by gradient steps; the sessions are plain onnxruntime's too. Regressors
are checked in `values`.
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
from reptile.export.verify.conformance import Check
from reptile.export.verify.raw import check_raw_rows
from reptile.export.verify.running import (
    ROUNDING,
    SETTINGS,
    Sessions,
    Subject,
    compare_answers,
    conformance,
    golden,
    read_manifest,
    run_checks,
    runtime,
    setting,
)
from reptile.learn.checkpoint import Checkpoint
from reptile.learn.episodic import ClosedForm
from reptile.models import MASK_BIAS
from reptile.objectives import CLASSIFICATION
from reptile.settings import VerifySettings
from reptile.tasks import FewShotProtocol, Purpose, check_classes, held_out_task, random_stream

SUPPORT_SIZES = (1, 2, 5, 25, 100)
WAYS = (2, 5, 20)
TOLERANCE = 1e-4  # beyond rounding, of which eager float32 has as much but not the same
EXACT = 1e-5  # between graphs, and between adding a class and adapting to all examples again
DISAGREE = 0.01  # share of predicted labels
FEW = 5  # classes of the tasks of the accuracy check, where there are as many


def verify_bundle(
    settings: VerifySettings, bundle: Path, checkpoint: Checkpoint, data: PreparedData
) -> dict[str, Any]:
    """Run every check of a closed-form classifier; arguments, result and errors as in `bundle`."""
    queries = CLASSIFICATION.validation.queries
    check_classes(data.split("test"), 2, settings.shots + queries, f"test split of {data.name}")
    manifest = read_manifest(bundle)
    sessions = Sessions(bundle, manifest, data.index.coding)
    return run_checks(GROUPS, _Subject(settings, bundle, manifest, sessions, checkpoint, data))


class ClosedFormSubject(Subject):
    """A bundle that learns in closed form."""

    def learner(self, dtype: torch.dtype = torch.float64) -> ClosedForm:
        """Return eager PyTorch's learner, in this precision."""
        return reference.cast(self.checkpoint.closed_form, dtype)


class _Subject(ClosedFormSubject):
    def task(self, size: int, ways: int, number: int = 0) -> tuple[Array, Array]:
        """Draw `size` images of the test split with their labels, cycling through the classes."""
        classes = self.data.split("test")
        rng = random_stream(self.settings.seed, Purpose.VERIFY, size, ways, number)
        ways = min(ways, len(classes.starts))
        labels = np.arange(size) % ways
        chosen = rng.permutation(len(classes.starts))[:ways][labels]
        rows = classes.starts[chosen] + rng.integers(classes.counts[chosen])
        return np.asarray(self.data.images[rows]), labels

    def adapt(self, images: Array, labels: Array) -> Tensors:
        return self.session("adapt")(_feeds(images, labels))

    def logits(self, images: Array, labels: Array, dtype: torch.dtype = torch.float64) -> Array:
        """Return eager PyTorch's logits of `queries` after adapting."""
        learner = self.learner(dtype)
        adapted = reference.adapt(learner, images, labels)
        return reference.predict(learner, adapted, self.queries())["logits"]

    def rounding(self, images: Array, labels: Array) -> float:
        """Return how far eager float32 is from eager float64."""
        return _error(self.logits(images, labels, torch.float32), self.logits(images, labels))

    def queries(self) -> Array:
        return self.task(7, 7, number=1)[0]


def _feeds(images: Array, labels: Array) -> Tensors:
    return {"support_images": images.astype(np.float32), "support_labels": labels}


def _error(actual: Array, wanted: Array) -> float:
    """Return the largest difference relative to the largest value; of what is not masked."""
    present = wanted > MASK_BIAS / 2
    if actual.shape != wanted.shape or not (actual[~present] <= MASK_BIAS / 2).all():
        return math.inf
    off = np.abs(actual.astype(np.float64) - wanted)[present].max(initial=0)
    return float(off / max(1.0, np.abs(wanted[present]).max(initial=0)))


def _adapt(subject: _Subject) -> Iterator[Check]:
    """Parity over support sizes, ways and degenerate tasks, in every setting of ONNX Runtime.

    The measure is the classifier's logits of queries; both sides use their own features.
    """
    queries = subject.queries()
    tasks = {
        f"{size} images, {ways} ways": subject.task(size, ways)
        for size in SUPPORT_SIZES
        for ways in WAYS
    }
    images, labels = subject.task(10, 5)
    tasks |= {
        "black images": (subject.session.possible(np.zeros_like(images)), labels),
        "equal images": (np.repeat(images[:1], len(images), axis=0), labels),
        "absent labels": (images, 3 * labels + 1),
    }
    if images.dtype == np.uint8:  # of other inputs 255 may be far more than float32 resolves
        tasks["white images"] = (np.full_like(images, 255), labels)
    wanted = {name: subject.logits(*task) for name, task in tasks.items()}
    rounding = {
        name: _error(subject.logits(*task, torch.float32), wanted[name])
        for name, task in tasks.items()
    }
    for optimised, threads in SETTINGS:
        adapt = subject.session("adapt", optimised, threads)
        predict = subject.session("predict_adapted", optimised, threads)
        outcomes = []
        for name, task in tasks.items():
            actual = adapt(_feeds(*task))
            logits = predict({"images": queries.astype(np.float32)} | _head(actual))["logits"]
            error = _error(logits, wanted[name]) if actual["finite"] else math.inf
            limit = ROUNDING * rounding[name] + TOLERANCE
            outcomes.append((error <= limit, -error / limit, error, limit, name))
        _, _, error, limit, name = min(outcomes)
        where, detail = setting(optimised, threads), f"worst of {len(outcomes)}: {name}"
        yield Check.at_most(f"adapted logits equal eager PyTorch's, {where}", error, limit, detail)


def _head(adapted: Tensors) -> Tensors:
    return {name: adapted[name] for name in ("head.weight", "head.bias")}


def _graphs_agree(subject: _Subject) -> Iterator[Check]:
    """`embed`, `fit` and `few_shot` compute the parts and the whole of `adapt`."""
    images, labels = subject.task(25, 5)
    queries = subject.queries().astype(np.float32)
    feeds = _feeds(images, labels)
    wanted = reference.embed(subject.learner(), images).numpy()
    rounding = _error(reference.embed(subject.learner(torch.float32), images).numpy(), wanted)
    for optimised, threads in SETTINGS:
        where = setting(optimised, threads)
        sessions = {
            name: subject.session(name, optimised, threads) for name in GRAPHS["closed_form"]
        }
        features = sessions["embed"]({"images": feeds["support_images"]})["features"]
        error, limit = _error(features, wanted), ROUNDING * rounding + EXACT
        yield Check.at_most(f"embed equals eager PyTorch, {where}", error, limit)
        adapted = sessions["adapt"](feeds)
        fitted = sessions["fit"]({"features": features, "support_labels": labels})
        error = max(_error(fitted[name], adapted[name]) for name in ("head.weight", "head.bias"))
        yield Check.at_most(f"embed and fit equal adapt, {where}", error, EXACT)
        predict = sessions["predict_adapted"]
        logits = predict({"images": queries} | _head(adapted))["logits"]
        alone = [predict({"images": each[None]} | _head(adapted))["logits"] for each in queries]
        error = _error(np.concatenate(alone), logits)
        yield Check.at_most(f"queries are independent, {where}", error, EXACT)
        both = sessions["few_shot"](feeds | {"query_images": queries})
        name = f"few_shot equals adapt and predict_adapted, {where}"
        yield Check.at_most(name, _error(both["logits"], logits), EXACT)


def _classes_come_and_go(subject: _Subject) -> Iterator[Check]:
    """A class added from features alone, or removed, gives what adapting to the rest gives.

    Adding changes the order of the examples, and so the rounding.
    """
    images, labels = subject.task(60, 12)
    rounding = subject.rounding(images, labels)
    queries = subject.queries().astype(np.float32)
    fit, predict = subject.session("fit"), subject.session("predict_adapted")
    last = labels.max()
    old = labels < last

    def logits(adapted: Tensors) -> Array:
        return predict({"images": queries} | _head(adapted))["logits"]

    def features(chosen: Array) -> Array:
        return subject.session("embed")({"images": images[chosen].astype(np.float32)})["features"]

    kept = subject.adapt(images[old], labels[old])["features"]
    order = np.concatenate([labels[old], labels[~old]])
    added = fit({"features": np.concatenate([kept, features(~old)]), "support_labels": order})
    error = _error(logits(added), logits(subject.adapt(images, labels)))
    limit = ROUNDING * rounding + EXACT
    yield Check.at_most("adding a class equals adapting to all examples", error, limit)
    every = subject.adapt(images, labels)["features"]
    removed = fit({"features": every[old], "support_labels": labels[old]})
    error = _error(logits(removed), logits(subject.adapt(images[old], labels[old])))
    yield Check.at_most("removing a class equals adapting to the others", error, EXACT)


def _adapt_depends(subject: _Subject) -> Iterator[Check]:
    """Outputs must depend on every input: none was traced into a constant."""
    images, labels = subject.task(5, 5)
    base = subject.adapt(images, labels)
    same = []
    for name, changed in {
        "support_images": subject.adapt(subject.task(5, 5, number=2)[0], labels),
        "support_labels": subject.adapt(images, np.roll(labels, 1)),
    }.items():
        error = _error(changed["head.weight"], base["head.weight"])
        if not error > 1e-3:
            same.append(f"{name} changes the result by {error:.2g} only")
    yield Check.none_of("adapt depends on every input", same)


def _adapt_guards(subject: _Subject) -> Iterator[Check]:
    """Bad input must not be reported as a success, nor take memory without bound."""
    images, labels = subject.task(5, 5)
    problems = []
    wanted = subject.adapt(images, labels)
    actual = subject.adapt(images, np.where(labels == 0, -1, labels))
    if any(not np.array_equal(actual[name], wanted[name]) for name in wanted):
        problems.append("negative labels are not clamped")
    ways = subject.manifest.ways
    if len(subject.adapt(images, np.where(labels == 4, 10**12, labels))["head.bias"]) != ways:
        problems.append(f"labels of {ways} and more are not clamped")
    bad = subject.session.bad_input
    for value in () if bad is None else {bad, np.inf}:
        spoilt = images.astype(np.float32)
        spoilt[0] = value
        if subject.adapt(spoilt, labels)["finite"]:
            problems.append(f"finite is true although an image is {value}")
    yield Check.none_of("adapt guards its inputs", problems)


def _accuracy(subject: _Subject) -> Iterator[Check]:
    """Few-shot scores on the same tasks, ONNX against PyTorch."""
    settings, data = subject.settings, subject.data
    classes, queries = data.split("test"), CLASSIFICATION.validation.queries
    ways = min(FEW, int((classes.counts >= settings.shots + queries).sum()))
    protocol = FewShotProtocol(ways, settings.shots, queries, steps=0, batch=1)
    session, learner = subject.session("few_shot"), subject.learner(torch.float32)

    def answers() -> Iterator[tuple[Array, Array, Array]]:
        for number in range(settings.tasks):
            stream = random_stream(settings.seed, Purpose.VERIFY, number)
            task = held_out_task(stream, classes, protocol)
            images, query = (np.asarray(data.images[rows]) for rows in (task.support, task.query))
            feeds = _feeds(images, task.support_targets)
            actual = session(feeds | {"query_images": query.astype(np.float32)})["logits"]
            adapted = reference.adapt(learner, images, task.support_targets)
            yield actual, reference.predict(learner, adapted, query)["logits"], task.query_targets

    yield from compare_answers(CLASSIFICATION, answers(), DISAGREE)


def raw_rows(subject: ClosedFormSubject) -> Iterator[Check]:
    """Compare the features of raw rows; see `check_raw_rows`."""

    def eager(inputs: Array, double: bool) -> Array:
        learner = subject.learner(torch.float64 if double else torch.float32)
        return np.asarray(reference.embed(learner, inputs).numpy())

    yield from check_raw_rows(subject.session, "embed", "features", eager)


GROUPS: tuple[Callable[[_Subject], Iterator[Check]], ...] = (
    conformance,
    _adapt,
    _graphs_agree,
    _classes_come_and_go,
    _adapt_depends,
    _adapt_guards,
    _accuracy,
    golden,
    raw_rows,
    runtime,
)
