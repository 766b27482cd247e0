"""Bayesian linear regression through all rooms: learnt, measured, exported, verified, used.

A shorter training than the preset's; what that reaches is in docs/training.md.
"""

import itertools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from schemas import validate_bundle

from reptile import stages
from reptile.data.dataset import PreparedData
from reptile.data.readers import sinusoid
from reptile.errors import DivergedError, InputError, VerificationError
from reptile.evaluate import evaluate, write_evaluation
from reptile.evaluate.metrics import read_metrics
from reptile.experiments.presets import preset_path
from reptile.files import sha256_file
from reptile.learn.checkpoint import Checkpoint, load_checkpoint
from reptile.runtime import FewShotRegressor
from reptile.settings import EvaluateSettings, Settings, load_settings

CHANGES = (
    "train.meta_iterations=300",
    "train.meta_batch=32",
    "train.checkpoint_every=150",
    "evaluate.tasks=60",
    "export.gate.mean_squared_error=0.5",
    "verify.tasks=40",
)


class Run(NamedTuple):
    """One run of all stages but the last."""

    settings: Settings
    data: PreparedData
    checkpoint: Checkpoint
    folder: Path

    def verify(self, bundle: Path) -> None:
        stages.verify(
            self.settings.verify,
            self.folder / "prepared",
            self.folder / "checkpoint",
            bundle,
            bundle.parent / "verification.json",
        )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("bayes")
    settings = load_settings(preset_path("sinusoid-bayes"), CHANGES)
    prepared, checkpoint, evaluation = (
        folder / name for name in ("prepared", "checkpoint", "evaluation")
    )
    with pytest.MonkeyPatch.context() as fewer:
        fewer.setattr(sinusoid, "SINUSOIDS", 2500)
        data = stages.prepare(settings.prepare, prepared)
    stages.train(
        settings.train, prepared, checkpoint, curves=folder / "curves", work=folder / "training"
    )
    stages.evaluate(settings.evaluate, prepared, checkpoint, evaluation)
    stages.export(settings.export, prepared, checkpoint, evaluation, folder / "bundle")
    return Run(settings, data, load_checkpoint(checkpoint), folder)


@pytest.fixture(scope="module")
def model(run: Run) -> FewShotRegressor:
    return FewShotRegressor.load(run.folder / "bundle")


def points(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.uniform(-5, 5, count)
    return x, rng.uniform(1, 5) * np.sin(x + rng.uniform(0, 2 * np.pi))


def posterior(run: Run, x: np.ndarray, y: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, ...]:
    """Mean and variance by the textbook's formula, in float64 on the network's features.

    The variance has the scale that validation tasks gave it.
    """
    learner = run.checkpoint.closed_form
    params = {name: value.double() for name, value in learner.params.items()}

    def phi(values: np.ndarray) -> np.ndarray:
        inputs = torch.from_numpy(values.astype(np.float32)).double().view(-1, 1, 1, 1)
        found = learner.model.features(params, inputs).numpy()
        return np.concatenate([found, np.ones((len(found), 1))], axis=1)

    raw = params["head.factor"].numpy()
    factor = np.tril(raw, -1) + np.diag(np.exp(np.diag(raw)))
    prior, mean = factor @ factor.T, params["head.mean"].numpy()
    shown, queries = phi(x), phi(asked)
    precision = shown.T @ shown + prior
    weights = np.linalg.solve(precision, shown.T @ y[:, None].astype(np.float32) + prior @ mean)
    spread = 1 + np.einsum("nd,dn->n", queries, np.linalg.solve(precision, queries.T))
    scale = read_metrics(run.folder / "evaluation").interval_scales["trained"].scale
    noise = scale**2 * np.exp(params["head.noise"].numpy())
    return queries @ weights, spread[:, None] * noise


def test_the_learner_beats_ridge_and_its_start(run: Run) -> None:
    metrics = read_metrics(run.folder / "evaluation")
    trained = metrics.score("sinusoid", 10, "trained", "none")
    for other in ("random", "ridge", "input_ridge", "mean", "zero"):
        score = metrics.score("sinusoid", 10, other, "none")
        assert trained.mean + trained.interval < score.mean, other
    assert metrics.ways == 1 and metrics.chosen and metrics.chosen.best == "trained"


def test_coverage_is_the_share_of_values_in_the_intervals(run: Run) -> None:
    result = evaluate(run.settings.evaluate, run.checkpoint, run.data, {}, baselines=False)
    written = read_metrics(run.folder / "evaluation").coverage["sinusoid"]
    for measured in result.held_out:
        shares = []
        for task in measured.tasks:
            x, y, asked, answers = (
                np.asarray(values).ravel()
                for values in (
                    run.data.images[task.support],
                    task.support_targets,
                    run.data.images[task.query],
                    task.query_targets,
                )
            )
            mean, variance = posterior(run, x, y, asked)
            half = NormalDist().inv_cdf(0.975) * np.sqrt(variance[:, 0])
            shares.append((np.abs(mean[:, 0] - answers) <= half).mean())
        assert written[measured.shots]["trained"].mean == pytest.approx(np.mean(shares), abs=1e-3)
        assert (
            written[measured.shots]["trained"].mean > 0.9 > written[measured.shots]["random"].mean
        )


def test_the_report_draws_the_intervals_and_says_how_often_they_hold(run: Run) -> None:
    text = (run.folder / "evaluation" / "report.html").read_text()
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    fits = [drawing for drawing in drawings if "before and after adaptation" in drawing]
    assert len(fits) == 6 and all(fit.count('class="band') == 1 for fit in fits)
    assert "How often the intervals hold" in text
    assert "How fast it adapts" not in text and "inner steps" not in text.split("Settings and")[0]


def test_the_report_shows_losses_below_zero(run: Run, tmp_path: Path) -> None:
    """As where values have little noise: the loss is the negative logarithm of a density."""
    curve = [point.model_copy(update={"loss": -0.5}) for point in run.checkpoint.info.curve]
    info = run.checkpoint.info.model_copy(update={"curve": tuple(curve)})
    settings = run.settings.evaluate.model_copy(update={"tasks": 2})
    checkpoint = run.checkpoint._replace(info=info)
    write_evaluation(evaluate(settings, checkpoint, run.data, {}, baselines=False), tmp_path)
    (chart,) = re.findall(
        r'<svg[^>]*aria-label="training loss".*?</svg>', (tmp_path / "report.html").read_text()
    )
    ElementTree.fromstring(chart)


def test_several_ways_are_refused(run: Run) -> None:
    with pytest.raises(InputError, match="5-way tasks: a task of values has one way"):
        evaluate(EvaluateSettings(tasks=2, shots=(5,)), run.checkpoint, run.data, {}, ways=5)


def test_the_bundle_is_verified(run: Run) -> None:
    validate_bundle(run.folder / "bundle")
    run.verify(run.folder / "bundle")
    manifest = json.loads((run.folder / "bundle" / "manifest.json").read_text())
    assert manifest["adapted"] == {"head.mean": [33, 1], "head.covariance": [33, 33]}
    assert manifest["learner"] == "closed_form" and manifest["head"] == "bayes"
    card = (run.folder / "bundle" / "MODEL_CARD.md").read_text()
    assert "predict_interval" in card and "lie in their 95 % intervals" in card


@pytest.mark.parametrize("constant", ["noise", "root"])
def test_a_wrong_constant_is_found(run: Run, tmp_path: Path, constant: str) -> None:
    """Graphs whose prior or noise is half as large again."""
    bundle = Path(shutil.copytree(run.folder / "bundle", tmp_path / "bundle"))
    path = bundle / "predict_adapted/1/model.onnx"
    graph = onnx.load(path)
    (found,) = [each for each in graph.graph.initializer if each.name.endswith(constant)]
    found.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(found) * 1.5, found.name))
    onnx.save(graph, path)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"]["predict_adapted/1/model.onnx"] = sha256_file(path)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(VerificationError, match="adapted variances equal eager PyTorch's"):
        run.verify(bundle)


@pytest.mark.parametrize("count", [1, 10, 300])
def test_the_runtime_predicts_the_textbooks_posterior(
    run: Run, model: FewShotRegressor, count: int
) -> None:
    x, y = points(count, count)
    asked = np.linspace(-5, 5, 40)
    mean, variance = posterior(run, x, y, asked)
    adapted = model.adapt(x, y)
    np.testing.assert_allclose(adapted.predict(asked), mean, atol=5e-4)
    low, high = adapted.predict_interval(asked)
    assert low.dtype == high.dtype == np.float32 and low.shape == (40, 1)
    np.testing.assert_allclose((high - low) / 2, 1.959964 * np.sqrt(variance), rtol=2e-3)
    np.testing.assert_allclose((high + low) / 2, mean, atol=5e-4)
    narrow = adapted.predict_interval(asked, level=0.5)
    np.testing.assert_allclose(
        (narrow.high - narrow.low) / (high - low), 0.67449 / 1.959964, rtol=1e-3
    )


def test_a_function_is_saved_and_the_bundle_checks_itself(
    model: FewShotRegressor, tmp_path: Path
) -> None:
    assert model.check() < 1e-2
    x, y = points(1, 12)
    adapted = model.adapt(x, y)
    assert adapted.losses.shape == (0,)
    adapted.save(tmp_path / "curve.task")
    kept = model.load_adapted(tmp_path / "curve.task")
    np.testing.assert_array_equal(kept.predict_interval(x), adapted.predict_interval(x))


@pytest.mark.parametrize("parts", [[1, 4], [3, 3, 200]])
def test_points_added_in_parts_equal_all_points_at_once(
    run: Run, model: FewShotRegressor, tmp_path: Path, parts: list[int]
) -> None:
    x, y = points(2, sum(parts))
    asked = np.linspace(-5, 5, 40)
    ends = np.cumsum(parts)
    grown = model.adapt(x[: parts[0]], y[: parts[0]])
    first = grown.predict(asked)
    for start, end in itertools.pairwise(ends):
        grown.save(tmp_path / "curve.task")  # what was saved can grow too
        before, grown = (
            grown,
            model.load_adapted(tmp_path / "curve.task").add(x[start:end], y[start:end]),
        )
        assert not np.allclose(before.predict(asked), grown.predict(asked), atol=1e-3)
    at_once = model.adapt(x, y)
    np.testing.assert_allclose(grown.predict(asked), at_once.predict(asked), atol=1e-5)
    np.testing.assert_allclose(
        grown.predict_interval(asked), at_once.predict_interval(asked), atol=1e-5
    )
    mean, _ = posterior(run, x, y, asked)
    np.testing.assert_allclose(grown.predict(asked), mean, atol=5e-4)
    np.testing.assert_array_equal(model.adapt(x[: parts[0]], y[: parts[0]]).predict(asked), first)


def test_a_function_of_an_earlier_version_predicts_and_cannot_grow(
    model: FewShotRegressor, tmp_path: Path
) -> None:
    """Its file has no points."""
    adapted = model.adapt([1.0, 2.0], [1.0, 0.0])
    replace(adapted, state=adapted.state._replace(examples=None)).save(tmp_path / "old.task")
    old = model.load_adapted(tmp_path / "old.task")
    np.testing.assert_array_equal(old.predict([0.5]), adapted.predict([0.5]))
    with pytest.raises(InputError, match="saved by an earlier version"):
        old.add([1.0], [1.0])


def test_what_cannot_be_added_is_refused(model: FewShotRegressor) -> None:
    adapted = model.adapt([1.0, 2.0], [1.0, 0.0])
    with pytest.raises(InputError, match="2 x but 1 y"):
        adapted.add([1.0, 2.0], [1.0])
    with pytest.raises(InputError, match="1002 points: this bundle adapts to 1"):
        adapted.add(np.zeros(1000), np.zeros(1000))


def test_what_makes_no_sense_is_refused(model: FewShotRegressor) -> None:
    with pytest.raises(InputError, match="closed form, without gradient steps"):
        model.adapt([1.0], [1.0], steps=3)
    with pytest.raises(DivergedError, match="not finite"):
        model.adapt([1.0, 1.0], [3e38, -3e38])
    adapted = model.adapt([1.0], [1.0])
    for level in (0, 1, 95, float("nan")):
        with pytest.raises(InputError, match="level must lie between 0 and 1"):
            adapted.predict_interval([1.0], level)
