"""The choice between learners, and the scale of their intervals, on classes that are few."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.optimize import minimize_scalar
from torch import nn

import reptile
from reptile.data.arrays import Splits
from reptile.errors import InputError, VerificationError
from reptile.evaluate.choice import by_preference, interval_scale, mean_of_classes
from reptile.evaluate.folds import parts, trained_again
from reptile.evaluate.metrics import Choice, Metrics, Score
from reptile.learn.heads import BayesHead
from reptile.learn.unadapted import with_interval_scale
from reptile.objectives import REGRESSION
from reptile.runtime import FewShotRegressor

ROWS = 12
PROTOCOL = reptile.EvaluateSettings(shots=(3,), queries=5, tasks=200)
FITTED = reptile.TrainSettings.model_validate(
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


class Time(nn.Module):
    """Features that are not trained: time itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 1.0


class Waves(nn.Module):
    """More of them, which lines do not need; as many numbers are trained in the network: none."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, torch.sin(3 * x), torch.cos(3 * x)], 1)


def lines(deviations: Sequence[float], splits: Splits) -> reptile.PreparedData:
    """A straight line for each subject, whose slope has this deviation, its noise half of it."""
    rng, subjects = np.random.default_rng(0), len(deviations)
    x = rng.uniform(-1, 1, (subjects, ROWS))
    y = (2 + np.array(deviations)[:, None] * rng.normal(size=(subjects, 1))) * x
    y += np.array(deviations)[:, None] / 2 * rng.normal(size=y.shape)
    names = np.repeat([f"s{number:03}" for number in range(subjects)], ROWS)
    return reptile.from_arrays(
        x.reshape(-1, 1).astype(np.float32), y.ravel(), tasks=names, splits=splits
    )


@pytest.fixture(scope="module")
def restless() -> reptile.PreparedData:
    """Subjects to validate and test on vary twice as much as those to train on."""
    names = [f"s{number:03}" for number in range(150)]
    return lines([0.5] * 50 + [1.0] * 100, {"validation": names[50:100], "test": names[100:]})


@pytest.fixture(scope="module")
def fitted(restless: reptile.PreparedData) -> reptile.Initialisation:
    return reptile.train(restless, FITTED, Time())


@pytest.fixture(scope="module")
def measured(fitted: reptile.Initialisation, restless: reptile.PreparedData) -> Metrics:
    return fitted.evaluate(restless, PROTOCOL)


def test_a_simpler_learner_is_chosen_unless_it_is_behind_by_a_standard_error() -> None:
    """By hand: of 101 classes, one standard error is the deviation over the root of 101."""
    noise = np.linspace(-1, 1, 101)
    error = float(noise.std(ddof=1) / np.sqrt(101))
    simple = np.full(101, 5.0)
    for gain, best in ((0.95 * error, "simple"), (1.05 * error, "complex")):
        scores = {"simple": simple, "complex": simple - gain + noise}
        assert by_preference(scores, better=-1)[0] == best
        assert by_preference({name: -each for name, each in scores.items()}, better=1)[0] == best
    assert by_preference({"complex": simple - 1, "simple": simple}, better=-1) == (
        "complex",
        "simple",
    )


def test_pairs_count_and_not_how_much_classes_differ() -> None:
    """A gain that every class has is seen, though classes differ a hundred times as much."""
    classes = np.array([1.0, 100.0, 10.0, 50.0])
    gains = np.array([0.9, 1.1, 1.0, 1.0])
    assert by_preference({"simple": classes, "complex": classes - gains}, -1)[0] == "complex"


def test_a_ratio_of_errors_counts_alike_in_every_class() -> None:
    """Half the error of nine subjects outweighs a fifth more of one whose error is a thousand."""
    simple = np.array([1.0] * 9 + [1000.0])
    errors = {"simple": simple, "complex": simple * ([0.5] * 9 + [1.2])}
    assert errors["simple"].mean() < errors["complex"].mean()
    compared = {name: REGRESSION.compared(each) for name, each in errors.items()}
    assert by_preference(compared, REGRESSION.better)[0] == "complex"
    ratio = np.exp((compared["complex"] - compared["simple"]).mean())
    assert ratio == pytest.approx((0.5**9 * 1.2) ** 0.1)
    assert REGRESSION.show_difference(math.log(2), math.log(4)) == "a factor of 2.00, 0.50 to 8.00"


def test_errors_of_nothing_but_rounding_are_equal() -> None:
    assert (REGRESSION.compared(np.array([0.0, 1e-15])) == REGRESSION.compared(np.zeros(2))).all()


@pytest.mark.parametrize("classes", [2, 3, 6, 30])
def test_a_learner_that_is_no_better_is_chosen_as_seldom_with_few_classes(classes: int) -> None:
    """One standard error with Student's t: 16 % of times, as with many; 25 % of pairs without."""
    rng = np.random.default_rng(classes)
    chosen = [
        by_preference({"simple": np.zeros(classes), "same": rng.normal(size=classes)}, -1)[0]
        for _ in range(4000)
    ]
    assert chosen.count("same") / 4000 == pytest.approx(stats.norm.sf(1), abs=0.02)


def test_one_class_or_none_that_differs_leaves_the_simplest() -> None:
    assert by_preference({"a": np.array([2.0]), "b": np.array([1.0])}, -1) == ("a", "b")
    assert by_preference({"a": np.ones(5), "b": np.ones(5)}, 1) == ("a", "b")


def test_the_order_says_what_is_chosen_of_any_learners() -> None:
    chosen = Choice(
        best="a",
        order=("a", "c", "b"),
        tasks=2,
        ways=1,
        classes=2,
        scores={name: Score(value, 0.5) for name, value in zip("abc", (2, 1, 1.5), strict=True)},
        differences={},
    )
    metrics = Metrics(
        objective="regression",
        metric="mean_squared_error",
        ways=1,
        held_out="x",
        chosen=chosen,
        scores={},
    )
    assert metrics.best_of(["b", "c"]) == "c" and metrics.best_of(["b", "a", "c"]) == "a"
    older = chosen.model_copy(update={"order": (), "classes": None})
    assert metrics.model_copy(update={"chosen": older}).best_of(["a", "b", "c"]) == "b"


def test_the_mean_of_each_class_has_the_weight_of_one() -> None:
    means = mean_of_classes(np.array([1.0, 3.0, 8.0, 2.0]), np.array([7, 7, 2, 7]))
    np.testing.assert_allclose(means, [8, 2])


def test_the_scale_is_that_of_greatest_likelihood() -> None:
    rng = np.random.default_rng(0)
    off, deviations = rng.normal(0, 2, 40), rng.uniform(0.5, 3, 40)

    def loss(scale: float) -> float:
        return float(-stats.norm.logpdf(off, scale=scale * deviations).sum())

    wanted = minimize_scalar(loss, bounds=(0.01, 20), method="bounded").x
    assert interval_scale((off / deviations) ** 2).scale == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("errors", [np.full(9, 4.0), np.zeros(30), np.full(30, np.inf)])
def test_the_scale_is_left_at_one_where_it_cannot_be_known(errors: np.ndarray) -> None:
    assert interval_scale(errors).scale == 1 and interval_scale(errors).classes == len(errors)


def test_scaled_intervals_are_the_posterior_of_a_scaled_prior_and_noise(
    fitted: reptile.Initialisation,
) -> None:
    """By the textbook's formula with both covariances times s²: equal means, s times the width."""
    scale, checkpoint = 1.7, fitted.checkpoint
    mean, root, noise = (each.numpy() for each in BayesHead.prior(checkpoint.closed_form.params))
    rng = np.random.default_rng(3)
    x, y, asked = rng.normal(size=(4, 1)), rng.normal(size=(4, 1)), rng.normal(size=(6, 1))
    phi, queries = np.c_[x, np.ones(4)], np.c_[asked, np.ones(6)]
    sigma = scale**2 * noise[0]
    prior = scale**2 * noise[0] * root @ root.T
    gain = prior @ phi.T @ np.linalg.inv(phi @ prior @ phi.T + sigma * np.eye(4))
    weights = mean + gain @ (y - phi @ mean)
    spread = queries @ (prior - gain @ phi @ prior) @ queries.T

    learner = with_interval_scale(checkpoint, scale).closed_form
    posterior = learner.posterior(torch.from_numpy(x), torch.from_numpy(y))
    found, variance = posterior.predict(torch.from_numpy(asked))
    np.testing.assert_allclose(found, queries @ weights, atol=1e-6)
    np.testing.assert_allclose(variance[:, 0], np.diag(spread) + sigma, rtol=1e-5)
    before, narrow = checkpoint.closed_form.posterior(
        torch.from_numpy(x), torch.from_numpy(y)
    ).predict(torch.from_numpy(asked))
    np.testing.assert_array_equal(found, before)
    np.testing.assert_allclose(variance, scale**2 * narrow, rtol=1e-6)


@pytest.fixture(scope="module")
def bundle(
    fitted: reptile.Initialisation,
    restless: reptile.PreparedData,
    measured: Metrics,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    fitted.export(folder, restless, metrics=measured)
    return folder


def test_intervals_hold_where_subjects_vary_more_than_the_prior_says(
    restless: reptile.PreparedData, measured: Metrics, bundle: Path
) -> None:
    """Those of the bundle, on each subject of the test; too narrow with the width of training."""
    found = measured.interval_scales["trained"]
    assert 35 < found.classes <= 50 and found.scale == pytest.approx(2, rel=0.15)
    model = FewShotRegressor.load(bundle)
    inside: dict[float, list[float]] = {1.0: [], found.scale: []}
    assert restless.targets is not None
    for entry in restless.classes:
        if entry.split == "test":
            rows = slice(entry.start, entry.start + entry.count)
            x, y = np.asarray(restless.images[rows]), np.asarray(restless.targets[rows])
            low, high = model.adapt(x[:3], y[:3]).predict_interval(x[3:])
            middle, half = (low + high) / 2, (high - low) / 2
            for scale, shares in inside.items():
                width = half * scale / found.scale
                shares.append(float((np.abs(y[3:] - middle) <= width).mean()))
    before, after = (float(np.mean(shares)) for shares in inside.values())
    assert before < 0.8 and 0.92 < after < 0.98
    covered = measured.coverage["arrays"][3]["trained"].mean
    assert covered == pytest.approx(after, abs=0.03)
    assert f"{found.scale:g} times" in (bundle / "MODEL_CARD.md").read_text()


def test_a_bundle_with_another_scale_fails_verification(
    fitted: reptile.Initialisation, restless: reptile.PreparedData, bundle: Path
) -> None:
    settings = reptile.VerifySettings(tasks=2)
    assert fitted.verify(bundle, restless, settings)["passed"]
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["metrics"]["interval_scales"]["trained"]["scale"] *= 1.01
    path.write_text(json.dumps(manifest))
    with pytest.raises(VerificationError, match="adapted variances equal eager PyTorch's"):
        fitted.verify(bundle, restless, settings)


def test_folds_measure_each_subject_by_learners_that_have_not_seen_it() -> None:
    data = lines([1.0] * 23, {"validation": 3, "test": 8})
    pool = {entry.name for entry in data.classes if entry.split != "test"}
    held: list[str] = []
    for part in parts(data, 4, seed=1):
        names = {
            split: {entry.name for entry in part.classes if entry.split == split}
            for split in ("train", "validation", "test")
        }
        assert names["train"] | names["validation"] == pool
        assert not names["train"] & names["validation"]
        assert names["test"] == {entry.name for entry in data.classes} - pool
        held += names["validation"]
    assert sorted(held) == sorted(pool)


def test_turned_copies_of_a_held_class_are_left_out() -> None:
    data = lines([1.0] * 8, {"validation": 1, "test": 2})
    copies = [entry.model_copy(update={"rotation": 90}) for entry in data.classes]
    turned = tuple(entry for entry in copies if entry.split == "train")
    index = data.index.model_copy(update={"classes": (*data.classes, *turned)})
    for part in parts(replace(data, index=index), 3, seed=0):
        held = {entry.name for entry in part.classes if entry.split == "validation"}
        copied = {entry.name for entry in part.classes if entry.rotation}
        assert held and copied and not held & copied


def test_a_learner_of_a_fold_is_that_of_a_training_on_its_split() -> None:
    data = lines([1.0] * 23, {"validation": 3, "test": 8})
    trained = reptile.train(data, FITTED, Time())
    (part, *_) = parts(data, 4, seed=1)
    names: Splits = {
        split: [entry.name for entry in part.classes if entry.split == split]
        for split in ("validation", "test")
    }
    anew = reptile.train(lines([1.0] * 23, names), FITTED, Time())
    again = trained_again(trained.checkpoint, part)
    assert not torch.equal(again.state.weights, trained.checkpoint.state.weights)
    assert torch.equal(again.state.weights, anew.checkpoint.state.weights)


def test_folds_choose_and_scale_on_all_subjects_that_are_not_for_the_test() -> None:
    """Of two learners with equally few numbers in the network, the one with fewer in its head."""
    data = lines([1.0] * 23, {"validation": 3, "test": 8})
    simple, other = (reptile.train(data, FITTED, each) for each in (Time(), Waves()))
    few = PROTOCOL.model_copy(update={"tasks": 4})
    folds = few.model_copy(update={"folds": 4})
    chosen, scales = {}, {}
    for settings in (few, folds):
        metrics = other.evaluate(data, settings, beside={"simple": simple})
        assert metrics.chosen
        chosen[settings.folds], scales[settings.folds] = metrics.chosen, metrics.interval_scales
        assert list(metrics.chosen.scores) == ["simple", "trained"]
    assert chosen[0].classes == 3 and chosen[4].classes == 15 and chosen[4].folds == 4
    assert chosen[4].best == "simple"
    assert scales[0]["simple"].scale == 1 != scales[4]["simple"].scale
    assert math.isclose(scales[4]["simple"].scale, 1, abs_tol=0.3)


@pytest.mark.parametrize(
    ("values", "words"),
    [({"folds": 1}, "at least 2, or 0"), ({"folds": -1}, "greater than or equal to 0")],
)
def test_folds_that_make_no_sense_are_refused(values: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        reptile.EvaluateSettings.model_validate(values)


@pytest.mark.parametrize("changes", [{"algorithm": "pretrain"}, {"meta_iterations": 2}])
def test_a_rate_of_zero_that_learns_nothing_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="learning_rate = 0: is for bayes"):
        reptile.TrainSettings.model_validate(FITTED.model_dump() | changes)


def test_more_folds_than_classes_are_refused() -> None:
    data = lines([1.0] * 4, {"validation": 1, "test": 1})
    trained = reptile.train(data, FITTED, Time())
    with pytest.raises(InputError, match="folds = 7: arrays has 3 classes for training"):
        trained.evaluate(data, PROTOCOL.model_copy(update={"folds": 7}))
