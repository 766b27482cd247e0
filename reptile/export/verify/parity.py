"""Checks that a bundle computes what eager PyTorch does, on many tasks and in many settings.

Sessions are plain onnxruntime's, independent of `reptile.runtime`; one check loads the bundle with
that runtime too. `conformance` checks the form of the files.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reptile.data.dataset import PreparedData
from reptile.export import reference
from reptile.export.reference import Array, SupportSet, Tensors
from reptile.export.verify.conformance import Check
from reptile.export.verify.raw import check_raw_rows
from reptile.export.verify.running import (
    ROUNDING,
    SETTINGS,
    Session,
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
from reptile.learn.engines import EagerEngine
from reptile.learn.validate import adapted_in_chunks
from reptile.minibatches import mini_batches
from reptile.models import MASK_BIAS
from reptile.objectives import CLASSIFICATION
from reptile.settings import VerifySettings
from reptile.tasks import (
    FewShotProtocol,
    Purpose,
    Task,
    check_classes,
    held_out_task,
    random_stream,
)

STEPS = (0, 1, 5, 50)
SUPPORT_SIZES = (1, 2, 5, 25, 17)  # some with fewer classes than outputs

# Beyond rounding: a ReLU that flips on a rounding error in one of the two and not in the other.
WARM_TOLERANCE = 1e-3
# One float32 run is one draw of rounding errors, and flips are rare and large: 1 of 50 runs of a
# hardly trained conv4 was 20 times as far off as all others. So where a graph misses the limit,
# this many further draws say what rounding can do to that task.
DRAWS = 32
# From a cold Adam state each weight moves by the sign of its gradient, even if that is only noise.
COLD_TOLERANCE = 5e-2
DISAGREE = {WARM_TOLERANCE: 0.01, COLD_TOLERANCE: 0.05}  # share of predicted labels


def verify_bundle(
    settings: VerifySettings, bundle: Path, checkpoint: Checkpoint, data: PreparedData
) -> dict[str, Any]:
    """Run every check; return {"passed": bool, "checks": [{"name", "passed", "measured", …}], …}.

    Args:
        settings: the tasks of the accuracy check.
        bundle: the folder.
        checkpoint: what the bundle was exported from.
        data: what the checkpoint was trained on; tasks come from its test split.

    Raises:
        InputError: there is no manifest to read, or the test split cannot make tasks.
    """
    ways = checkpoint.info.settings.ways
    needed = settings.shots + checkpoint.info.objective.validation.queries
    check_classes(data.split("test"), ways, needed, f"test split of {data.name}")
    manifest = read_manifest(bundle)
    sessions = Sessions(bundle, manifest, data.index.coding)
    return run_checks(GROUPS, _Subject(settings, bundle, manifest, sessions, checkpoint, data))


class _Subject(Subject):
    @property
    def tolerance(self) -> float:
        cold = self.adam and self.checkpoint.meta.inner.step == 0
        return COLD_TOLERANCE if cold else WARM_TOLERANCE

    def allowed(self, steps: int) -> int:
        return min(steps, self.manifest.max_steps)

    def task(self, size: int, steps: int, number: int = 0) -> SupportSet:
        """Draw a support set of `size` images of the test split, cycling through its classes."""
        classes, ways = self.data.split("test"), self.checkpoint.info.settings.ways
        rng = random_stream(self.settings.seed, Purpose.VERIFY, size, number)
        labels = np.arange(size) % ways
        chosen = rng.permutation(len(classes.starts))[:ways][labels]
        rows = classes.starts[chosen] + rng.integers(classes.counts[chosen])
        batches = mini_batches(rng, size, self.manifest.batch, steps)
        targets = labels if self.data.targets is None else np.asarray(self.data.targets[rows])
        return SupportSet(np.asarray(self.data.images[rows]), targets, batches)

    def queries(self) -> Array:
        return self.task(7, 0, number=1).images


@dataclass(frozen=True)
class _Oracle:
    """Eager PyTorch's results on a task: in float64, and float32's deviation from them."""

    name: str
    task: SupportSet
    wanted: Tensors
    start: Tensors  # before any step: what displacements are measured from
    rounding: float
    checkpoint: Checkpoint

    @classmethod
    def of(cls, name: str, subject: _Subject, task: SupportSet) -> "_Oracle":
        checkpoint = subject.checkpoint
        wanted = reference.adapt(checkpoint, task, torch.float64)
        start = reference.adapt(checkpoint, task.first(0), torch.float64)
        single = reference.adapt(checkpoint, task, torch.float32)
        rounding = _adapted_error(single, wanted, start)
        return cls(name, task, wanted, start, rounding, checkpoint)

    def error(self, actual: Tensors) -> float:
        return _adapted_error(actual, self.wanted, self.start)

    def limit(self, error: float, tolerance: float) -> float:
        """Return the largest error that rounding explains."""
        limit = ROUNDING * self.rounding + tolerance
        if error <= limit or not math.isfinite(error):
            return limit
        return ROUNDING * max(self.rounding, self.instability) + tolerance

    @cached_property
    def instability(self) -> float:
        """The largest error that noise of the size of float32's rounding causes in float64."""
        return max(
            self.error(reference.adapt(self.checkpoint, self.task, torch.float64, noise=seed))
            for seed in range(DRAWS)
        )


def _adapted_error(actual: Tensors, wanted: Tensors, start: Tensors) -> float:
    """Return the error of the losses or of the weights, whichever is larger.

    Of the weights: the distance from those wanted, as a share of how far the task moved them (or
    of a hundredth of their length, where it hardly did). Of the losses: relative to their length.
    """
    names = [name for name in wanted if name != "losses"]
    got, want, origin = (
        np.concatenate([tensors[name].ravel() for name in names]).astype(np.float64)
        for tensors in (actual, wanted, start)
    )
    masked = origin <= MASK_BIAS / 2  # they would dominate the norm
    if not (got[masked] <= MASK_BIAS / 2).all():
        return math.inf
    got, want, origin = (values[~masked] for values in (got, want, origin))
    weights = _norm(got - want) / max(_norm(want - origin), 0.01 * _norm(want))
    losses = _norm(actual["losses"] - wanted["losses"]) / max(1.0, _norm(wanted["losses"]))
    return float(np.maximum(weights, losses))  # unlike max(), passes NaN on


def _norm(values: Array) -> float:
    return float(np.linalg.norm(values))


def _logit_error(actual: Array, wanted: Array) -> float:
    """Relative to the largest; of outputs that are not masked."""
    present = wanted > MASK_BIAS / 2
    off = np.abs(actual - wanted)[present].max()
    return float(off / max(1.0, np.abs(wanted[present]).max()))


def _adapt(subject: _Subject) -> Iterator[Check]:
    """Parity over support sizes, steps and degenerate tasks, in every setting of ONNX Runtime."""
    oracles = []
    for size in SUPPORT_SIZES:
        task = subject.task(size, subject.allowed(max(STEPS)))
        for steps in sorted({subject.allowed(steps) for steps in STEPS}):
            name = f"{size} images, {steps} steps"
            oracles.append(_Oracle.of(name, subject, task.first(steps)))
    some = subject.task(10, 5)
    # Zero gradients and dead ReLUs: images without any contrast, and equal ones.
    degenerate = {
        "black images": np.zeros_like(some.images),
        "equal images": np.repeat(some.images[:1], len(some.images), axis=0),
    }
    if some.images.dtype == np.uint8:
        degenerate["white images"] = np.full_like(some.images, 255)
    for name, images in degenerate.items():
        possible = some._replace(images=subject.session.possible(images))
        oracles.append(_Oracle.of(name, subject, possible))
    for optimised, threads in SETTINGS:
        where = setting(optimised, threads)
        session = subject.session("adapt", optimised, threads)
        outcomes = []
        for oracle in oracles:
            actual = session(oracle.task.feeds(subject.checkpoint))
            error = oracle.error(actual) if actual["finite"] else math.inf
            limit = oracle.limit(error, subject.tolerance)
            outcomes.append((error <= limit, -error / limit, error, limit, oracle.name))
        _, _, error, limit, name = min(outcomes)
        detail = f"worst of {len(oracles)}: {name}"
        yield Check.at_most(f"adapt equals eager PyTorch, {where}", error, limit, detail)


def _adapt_depends(subject: _Subject) -> Iterator[Check]:
    """Outputs must depend on every input: none was traced into a constant."""
    session, checkpoint = subject.session("adapt"), subject.checkpoint
    task = subject.task(5, 5)
    feeds = task.feeds(checkpoint)
    base, start = session(feeds), session(task.first(0).feeds(checkpoint))
    other = subject.task(5, 5, number=2)
    changes = {
        "support_images": [other.feeds(checkpoint)["support_images"]],
        "support_labels": [np.roll(task.labels, 1, axis=0)],
        "batches": [np.zeros_like(task.batches)],
        # Half moves too little where the start fits already; eight times may diverge elsewhere.
        "learning_rate": [np.asarray(feeds["learning_rate"] * by) for by in (0.5, 8)],
    }
    same = []
    for name, values in changes.items():
        errors = [_adapted_error(session(feeds | {name: value}), base, start) for value in values]
        error = float(np.nanmax(errors))
        if not error > 0.01:
            same.append(f"{name} changes the result by {error:.2g} only")
    yield Check.none_of("adapt depends on every input", same)


def _adapt_guards(subject: _Subject) -> Iterator[Check]:
    """Bad input must neither read out of bounds nor be reported as a success."""
    session = subject.session("adapt")
    task, last = subject.task(5, 5), subject.checkpoint.model.outputs - 1
    feeds = task.feeds(subject.checkpoint)
    problems = []
    out_of_range = [
        ("batches", np.where(task.batches == 4, 99, task.batches)),
        ("batches", np.where(task.batches == 0, -99, task.batches)),
    ]
    if subject.objective is CLASSIFICATION:
        out_of_range += [
            ("support_labels", np.where(task.labels == last, last + 9, task.labels)),
            ("support_labels", np.where(task.labels == 0, -1, task.labels)),
        ]
    for name, wild in out_of_range:
        actual, wanted = session(feeds | {name: wild}), session(feeds)
        if any(not np.array_equal(actual[key], wanted[key]) for key in wanted):
            problems.append(f"{name} out of range are not clamped")
    not_finite = {"learning_rate": np.array(np.inf, dtype=np.float32)}
    if (bad := subject.session.bad_input) is not None:
        not_finite["support_images"] = np.full_like(feeds["support_images"], bad)
    for name, value in not_finite.items():
        if _accepts(session, feeds | {name: value}):
            problems.append(f"finite is true although {name} is not")
    yield Check.none_of("adapt guards its inputs", problems)


def _accepts(session: Session, feeds: Tensors) -> bool:
    """Return whether `finite` is true; what ONNX Runtime itself refuses is not accepted."""
    try:
        return bool(session(feeds)["finite"])
    except Exception:  # its own classes: a number that is no index of an embedding, say
        return False


def _prediction(subject: _Subject) -> Iterator[Check]:
    """Parity of the other graphs, and independence of queries."""
    checkpoint, images = subject.checkpoint, subject.queries()
    pixels = images.astype(np.float32)
    single, double = torch.float32, torch.float64
    wanted = reference.predict(checkpoint, images, double)
    rounding = _logit_error(reference.predict(checkpoint, images, single), wanted)
    limit = ROUNDING * rounding + 1e-5
    task = subject.task(5, 5)
    feeds = task.feeds(checkpoint)
    for optimised, threads in SETTINGS:
        where = setting(optimised, threads)
        actual = subject.session("predict", optimised, threads)({"images": pixels})["logits"]
        error = _logit_error(actual, wanted)
        yield Check.at_most(f"predict equals eager PyTorch, {where}", error, limit)

        adapted = subject.session("adapt", optimised, threads)(feeds)
        weights = {name: adapted[name] for name in subject.manifest.weights}
        session = subject.session("predict_adapted", optimised, threads)
        logits = session({"images": pixels} | weights)["logits"]
        expected = reference.predict_adapted(checkpoint, weights, images, double)
        error = _logit_error(logits, expected)
        yield Check.at_most(f"predict_adapted equals eager PyTorch, {where}", error, 1e-4)

        alone = [session({"images": image[None]} | weights)["logits"] for image in pixels]
        error = _logit_error(np.concatenate(alone), logits)
        yield Check.at_most(f"queries are independent, {where}", error, 1e-5)

        session = subject.session("few_shot", optimised, threads)
        both = session(feeds | {"query_images": pixels})
        error = np.maximum(
            _logit_error(both["logits"], logits), _logit_error(both["losses"], adapted["losses"])
        )
        name = f"few_shot equals adapt and predict_adapted, {where}"
        yield Check.at_most(name, float(error), 1e-4)


def _accuracy(subject: _Subject) -> Iterator[Check]:
    """Few-shot scores on the same tasks, ONNX against PyTorch."""
    settings, checkpoint, data = subject.settings, subject.checkpoint, subject.data
    model, state, info = checkpoint.model, checkpoint.meta, checkpoint.info
    objective = info.objective
    protocol = FewShotProtocol(
        info.settings.ways,
        settings.shots,
        queries=objective.validation.queries,
        steps=subject.allowed(settings.steps),
        batch=subject.manifest.batch,
    )
    streams = (random_stream(settings.seed, Purpose.VERIFY, i) for i in range(settings.tasks))
    tasks = [held_out_task(stream, data.split("test"), protocol) for stream in streams]
    engine = EagerEngine(model, info.settings.optimizer, data.images, reference.CPU)
    session = subject.session("few_shot")

    def onnx(task: Task) -> Array:
        batches = np.stack(task.batches)
        support = SupportSet(data.images[task.support], task.support_targets, batches)
        queries = data.images[task.query].astype(np.float32)
        feeds = support.feeds(checkpoint) | {"query_images": queries}
        return np.asarray(session(feeds)["logits"])

    def answers() -> Iterator[tuple[Array, Array, Array]]:
        with ThreadPoolExecutor(1) as pool:  # ONNX Runtime on one core, PyTorch on another
            found = pool.map(onnx, tasks)
            for chunk, weights in adapted_in_chunks(engine, state, tasks):
                predicted = engine.predict(weights, chunk, "frozen").numpy()
                for task, eager, actual in zip(chunk, predicted, found, strict=False):
                    yield actual, eager, task.query_targets

    yield from compare_answers(objective, answers(), DISAGREE[subject.tolerance])


def _raw_rows(subject: _Subject) -> Iterator[Check]:
    def eager(inputs: Array, double: bool) -> Array:
        dtype = torch.float64 if double else torch.float32
        return reference.predict(subject.checkpoint, inputs, dtype)

    yield from check_raw_rows(subject.session, "predict", "logits", eager)


GROUPS: tuple[Callable[[_Subject], Iterator[Check]], ...] = (
    conformance,
    _adapt,
    _adapt_depends,
    _adapt_guards,
    _prediction,
    _accuracy,
    golden,
    _raw_rows,
    runtime,
)
