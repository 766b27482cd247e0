"""Regression through all rooms: sinusoids prepared, learnt, measured, exported, verified, served.

The settings are the published ones but for a shorter training; what they reach in full is in
docs/training.md.
"""

import csv
import json
import re
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from schemas import validate_bundle

from reptile import stages
from reptile.data.dataset import PreparedData, load_prepared
from reptile.data.readers import sinusoid
from reptile.errors import DivergedError, InputError
from reptile.evaluate import Evaluation, evaluate
from reptile.evaluate.gate import refusal
from reptile.evaluate.metrics import Metrics, Score, read_metrics
from reptile.export import reference
from reptile.learn.checkpoint import Checkpoint, load_checkpoint
from reptile.minibatches import mini_batches
from reptile.runtime import FewShotModel, FewShotRegressor
from reptile.settings import EvaluateSettings, ExportSettings, Settings, load_settings

CHANGES = (
    "train.meta_iterations=1500",
    "train.meta_batch=5",
    "train.meta_step=1.0",
    "train.checkpoint_every=500",
    "evaluate.tasks=80",
    "export.gate.mean_squared_error=2.5",
    "export.gate.above_random=0.5",
    "verify.tasks=40",
    "verify.steps=8",
)
ZERO = (5**3 - 0.1**3) / (3 * 4.9) / 2  # E[a²] / 2: the error of always answering 0


class Run(NamedTuple):
    """One run of all stages."""

    settings: Settings
    data: PreparedData
    checkpoint: Checkpoint
    evaluation: Evaluation
    folder: Path

    @property
    def metrics(self) -> Metrics:
        return read_metrics(self.folder / "evaluation")

    def score(self, method: str) -> Score:
        return self.metrics.score("sinusoid", 10, method, "frozen")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("sinusoid")
    preset = Path(stages.__file__).parent / "experiments/presets/sinusoid.yaml"
    settings = load_settings(preset, CHANGES)
    prepared, checkpoint, evaluation = (
        folder / name for name in ("prepared", "checkpoint", "evaluation")
    )
    with pytest.MonkeyPatch.context() as fewer:
        fewer.setattr(sinusoid, "SINUSOIDS", 2500)
        data = stages.prepare(settings.prepare, prepared)
    curves = folder / "curves"
    stages.train(settings.train, prepared, checkpoint, curves=curves, work=folder / "training")
    measured = stages.evaluate(settings.evaluate, prepared, checkpoint, evaluation)
    stages.export(settings.export, prepared, checkpoint, evaluation, folder / "bundle")
    return Run(settings, data, load_checkpoint(checkpoint), measured, folder)


@pytest.fixture(scope="module")
def model(run: Run) -> FewShotRegressor:
    return FewShotRegressor.load(run.folder / "bundle")


def points(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.uniform(-5, 5, count)
    return x, rng.uniform(1, 5) * np.sin(x + rng.uniform(0, 2 * np.pi))


def test_the_curve_of_training_is_of_the_error(run: Run) -> None:
    scores = [point.score for point in run.checkpoint.info.curve]
    assert scores[-1] < min(scores[0], ZERO / 1.5)
    path = run.folder / "curves" / "plots" / "metrics" / "validation_mean_squared_error.tsv"
    written = [float(line.split("\t")[-1]) for line in path.read_text().splitlines()[1:]]
    assert written == pytest.approx(scores)


def test_meta_training_beats_zero_the_random_start_and_joint_training(run: Run) -> None:
    zero, trained = run.score("zero"), run.score("trained")
    assert zero.mean == pytest.approx(ZERO, abs=3 * zero.interval)
    for other in (zero, run.score("random"), run.score("joint")):
        assert trained.mean + trained.interval < other.mean


def test_the_error_is_that_of_a_float64_loop_written_out(run: Run) -> None:
    """Plain torch on the points themselves: no engine, no prepared rows."""
    (measured,) = run.evaluation.measurements
    assert run.data.targets is not None
    weights = load_file(run.folder / "checkpoint" / "weights.safetensors")
    names = [
        f"{layer}.{part}" for layer in ("hidden1", "hidden2", "head") for part in ("weight", "bias")
    ]
    start = [weights[f"weights/{name}"].double() for name in names]
    errors = []
    for task in measured.tasks[:20]:
        x, y, asked, answers = (
            torch.from_numpy(np.asarray(values)).double().reshape(-1, 1)
            for values in (
                run.data.images[task.support],
                run.data.targets[task.support],
                run.data.images[task.query],
                run.data.targets[task.query],
            )
        )
        params = [p.clone().requires_grad_() for p in start]

        def network(x: torch.Tensor, p: list[torch.Tensor] = params) -> torch.Tensor:
            hidden = torch.tanh(torch.tanh(x @ p[0].T + p[1]) @ p[2].T + p[3])
            return hidden @ p[4].T + p[5]

        optimiser = torch.optim.SGD(params, lr=0.02)
        for _ in range(32):  # all ten points in each step, in whatever order
            optimiser.zero_grad()
            ((network(x) - y) ** 2).mean().backward()
            optimiser.step()
        with torch.no_grad():
            errors.append(float(((network(asked) - answers) ** 2).mean()))
    found = measured.scores("trained", "frozen")[:20]
    assert found.mean() == pytest.approx(np.mean(errors), rel=2e-3)
    np.testing.assert_allclose(found, errors, rtol=0.03)  # some trajectories double roundings


def test_the_error_falls_step_by_step(run: Run) -> None:
    path = run.folder / "evaluation" / "mean_squared_error_by_step.csv"
    with path.open() as file:
        rows = list(csv.DictReader(file))
    trained = [float(row["trained_frozen"]) for row in rows]
    assert rows[-1]["step"] == "32"
    assert trained[-1] < trained[0] / 2
    assert {"joint_frozen", "random_frozen"} <= set(rows[0])


def test_the_report_draws_the_functions_before_and_after(run: Run) -> None:
    text = (run.folder / "evaluation" / "report.html").read_text()
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    fits = [drawing for drawing in drawings if "before and after adaptation" in drawing]
    assert len(fits) == 6
    for drawing in fits:
        assert drawing.count('class="shown"') == 10
        assert drawing.count('class="ring"') == 40
        assert all(label in drawing for label in ("before", "1 step", "32 steps"))
    assert "always zero" in text
    assert not (run.folder / "evaluation" / "confusion.csv").exists()


def test_the_curves_drawn_are_those_of_the_adapted_network(run: Run) -> None:
    (measured,) = run.evaluation.measurements
    for number, fit in enumerate(run.evaluation.fits):
        answered = np.interp(fit.queries.x, fit.x, fit.by_step[32])  # between the grid's places
        np.testing.assert_allclose(answered, measured.logits["frozen"][number, :, 0], atol=0.05)


def test_the_gate_wants_the_error_to_be_small(run: Run) -> None:
    metrics, gate = run.metrics, run.settings.export.gate
    error = run.score("trained").mean
    assert refusal(gate, metrics) is None
    strict = gate.model_copy(update={"mean_squared_error": error / 2})
    reason = refusal(strict, metrics)
    assert reason is not None and "mean squared error" in reason and "above the gate" in reason
    methods = {
        "trained": {"frozen": Score(error / 9, 0.01)},
        "random": {"frozen": Score(4.0, 0.1)},
    }
    better = metrics.model_copy(update={"scores": {"sinusoid": {10: methods}}})
    reason = refusal(gate, metrics, better)
    assert reason is not None and "wholly above the champion's" in reason
    assert refusal(gate, better, metrics) is None


def test_the_bundle_is_verified(run: Run) -> None:
    validate_bundle(run.folder / "bundle")
    report = stages.verify(
        run.settings.verify,
        run.folder / "prepared",
        run.folder / "checkpoint",
        run.folder / "bundle",
        run.folder / "verification.json",
    )
    assert report["passed"]
    names = {check["name"] for check in report["checks"]}
    assert "few-shot mean squared error within PyTorch's 95 % interval" in names
    assert len(names) > 40


def test_the_manifest_tells_a_regressor_from_a_classifier(run: Run) -> None:
    manifest = json.loads((run.folder / "bundle" / "manifest.json").read_text())
    assert manifest["task"] == {
        "kind": "regression",
        "outputs": 1,
        "image_shape": [1, 1, 1],
        "layout": "NCHW",
        "dtype": "float32",
    }
    inputs = {tensor["name"]: tensor for tensor in manifest["graphs"]["adapt"]["inputs"]}
    assert inputs["support_labels"] == {
        "name": "support_labels",
        "dtype": "float32",
        "shape": ["support", 1],
    }
    card = (run.folder / "bundle" / "MODEL_CARD.md").read_text()
    assert "few-shot regressor" in card and "FewShotRegressor" in card


def test_the_runtime_learns_a_new_function_from_ten_points(
    run: Run, model: FewShotRegressor
) -> None:
    assert model.check() < 1e-3
    before, after = [], []
    for seed in range(30):
        x, y = points(seed, 60)
        adapted = model.adapt(x[:10], y[:10])
        values = adapted.predict(x[10:])
        assert values.shape == (50, 1) and values.dtype == np.float32
        assert adapted.losses.shape == (32,)
        before.append(np.square(y[10:]).mean())
        after.append(np.square(values[:, 0] - y[10:]).mean())
    assert np.mean(after) < np.mean(before) / 2


def test_the_runtime_predicts_as_the_eager_engine_in_float64(
    run: Run, model: FewShotRegressor
) -> None:
    x, y = points(3, 20)
    inputs = x.astype(np.float32).reshape(-1, 1, 1, 1)
    values = y.astype(np.float32).reshape(-1, 1)
    batches = mini_batches(np.random.default_rng(0), 10, 10, 32)
    task = reference.SupportSet(inputs[:10], values[:10], batches)
    folded = reference.adapt(run.checkpoint, task, torch.float64)
    wanted = reference.predict_adapted(run.checkpoint, folded, inputs[10:], torch.float64)
    found = model.adapt(x[:10], y[:10]).predict(x[10:])
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_shapes_of_points_do_not_matter_and_tasks_can_be_kept(
    model: FewShotRegressor, tmp_path: Path
) -> None:
    x, y = points(1, 12)
    adapted = model.adapt(x, y)
    same = model.adapt(x.reshape(-1, 1, 1, 1), y[:, None].astype(np.float32))
    np.testing.assert_array_equal(adapted.predict(x), same.predict(x))
    adapted.save(tmp_path / "curve.task")
    kept = model.load_adapted(tmp_path / "curve.task")
    np.testing.assert_array_equal(kept.predict(x), adapted.predict(x))
    assert adapted.predict([]).shape == (0, 1)


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        ([1.0, 2.0], [1.0], "2 x but 1 y"),
        ([], [], r"0 points: this bundle adapts to 1\.\.1000"),
        ([[1.0, 2.0]], [1.0], r"x have shape \(1, 2\), expected \(N,\) or \(N, 1, 1, 1\)"),
        ([1.0], ["a"], "y must be numbers"),
        ([1.0], [np.nan], "y hold NaN"),
        ([1e300], [1.0], "x hold NaN, or numbers that are not finite in float32"),
        (1.0, [1.0], r"x have shape \(\)"),
    ],
)
def test_points_that_cannot_be_used_are_refused(
    model: FewShotRegressor, x: Any, y: Any, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        model.adapt(x, y)


def test_points_far_off_that_make_it_diverge_are_reported(model: FewShotRegressor) -> None:
    with pytest.raises(DivergedError, match="diverged"):
        model.adapt([1.0, 2.0], [1e30, -1e30])


def test_each_runtime_says_which_bundles_are_the_others(run: Run) -> None:
    with pytest.raises(InputError, match=r"open it with FewShotRegressor\.load"):
        FewShotModel.load(run.folder / "bundle")


def test_ways_have_no_meaning_for_a_regressor(run: Run) -> None:
    checkpoint, data = (
        load_checkpoint(run.folder / "checkpoint"),
        load_prepared(run.folder / "prepared"),
    )
    with pytest.raises(InputError, match=r"2-way tasks: .* is for 1 to 1 ways"):
        evaluate(EvaluateSettings(tasks=2, shots=(5,)), checkpoint, data, {}, ways=2)


def test_steps_beyond_the_bundles_limit_are_refused_at_export(run: Run, tmp_path: Path) -> None:
    settings = ExportSettings(max_steps=31)
    with pytest.raises(InputError, match=r"max_steps = 31 is below evaluate\.steps = 32"):
        stages.export(
            settings,
            run.folder / "prepared",
            run.folder / "checkpoint",
            run.folder / "evaluation",
            tmp_path / "bundle",
            ignore_gate=True,
        )
